"""What is computed: NumPy in, NumPy out. No HTTP, no hardware, no files."""
