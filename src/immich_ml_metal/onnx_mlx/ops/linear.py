"""Matrix products. MLX accumulates them in float32 whatever the type of the operands."""

import mlx.core as mx

from immich_ml_metal.onnx_mlx.ops.call import Call, Operator, Table


def matmul(call: Call, x: mx.array, y: mx.array) -> mx.array:
    """MatMul: matrix product with NumPy's rules for vectors and stacks."""
    return mx.matmul(x, y)


def linear(call: Call, x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    """MatMul and Add in one: x @ weight + bias, for a (K, N) weight and an (N,) bias."""
    return mx.addmm(bias, x, weight)


def gemm(call: Call, x: mx.array, y: mx.array, bias: mx.array | None = None) -> mx.array:
    """Gemm: alpha * x' @ y' + beta * bias on matrices, either transposed first on request."""
    alpha, beta = call.number("alpha", 1.0), call.number("beta", 1.0)
    x = x.T if call.integer("transA") else x
    y = y.T if call.integer("transB") else y
    if bias is not None:
        return mx.addmm(bias, x, y, alpha=alpha, beta=beta)
    return mx.matmul(x, y) if alpha == 1 else alpha * mx.matmul(x, y)


def einsum(call: Call, *operands: mx.array) -> mx.array:
    """Einsum: products and sums by index letters."""
    return mx.einsum(call.text("equation").replace(" ", ""), *operands)


TABLE: Table = {
    "MatMul": Operator(matmul),
    "Linear": Operator(linear, on_device=True),
    "Gemm": Operator(gemm),
    "Einsum": Operator(einsum),
}
