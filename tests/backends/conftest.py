from doubles.mlx_device import on_the_cpu as on_the_cpu
