"""Attention on `mx.fast.scaled_dot_product_attention`, which keeps its softmax in float32."""

import mlx.core as mx
import numpy as np

from immich_ml_metal.onnx_mlx.ops.call import (
    Call,
    Operator,
    Table,
    Unsupported,
    Value,
    is_floating,
    to_device,
)

RANK = 4  # MLX wants (batch, heads, length, depth)


def sdpa(call: Call, q: mx.array, k: mx.array, v: mx.array, mask: Value | None = None) -> mx.array:
    """What the attention pass makes of a decomposed attention: softmax(scale q k^T + mask) v.

    q is (..., L, D), k and v are (..., S, D); with `transposed_keys`, k is (..., D, S). The axes
    before broadcast. A mask of floats is added, one of booleans selects. With `guarded`, a row that
    sees nothing gives zeros and not NaN.
    """
    if call.integer("transposed_keys"):
        k = k.swapaxes(-1, -2)
    lead = np.broadcast_shapes(*(tuple(t.shape[:-2]) for t in (q, k, v)))
    if len(lead) > RANK - 2:
        raise Unsupported(f"attention over {len(lead) + 2} axes")
    four = [mx.broadcast_to(_lift(t), (*_lift_shape(lead), *t.shape[-2:])) for t in (q, k, v)]
    scale = call.number("scale", 1.0)
    chosen = _mask(q, k, mask, causal=bool(call.integer("causal")))
    out = mx.fast.scaled_dot_product_attention(*four, scale=scale, mask=chosen)
    if call.integer("guarded"):
        out = mx.where(mx.isnan(out), 0, out)
    return out.reshape(*lead, *out.shape[-2:])


def attention(
    call: Call,
    q: mx.array,
    k: mx.array,
    v: mx.array,
    mask: Value | None = None,
    *past: mx.array | None,
) -> mx.array:
    """Attention (opset 23): heads on an axis of their own, or packed into the last one."""
    if any(p is not None for p in past) or len([name for name in call.node.outputs if name]) > 1:
        raise Unsupported("attention with a key-value cache")
    if call.number("softcap"):
        raise Unsupported("attention with softcap")
    packed = q.ndim < RANK
    if packed:
        q = _split_heads(q, call.integer("q_num_heads"))
        k, v = (_split_heads(t, call.integer("kv_num_heads")) for t in (k, v))
    scale = call.number("scale") if call.has("scale") else q.shape[-1] ** -0.5
    chosen = _mask(q, k, mask, causal=bool(call.integer("is_causal")))
    out = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=chosen)
    if not packed:
        return out
    return out.transpose(0, 2, 1, 3).reshape(out.shape[0], out.shape[2], -1)


def _lift(x: mx.array) -> mx.array:
    return x.reshape((1,) * (RANK - x.ndim) + tuple(x.shape))


def _lift_shape(lead: tuple[int, ...]) -> tuple[int, ...]:
    return (1,) * (RANK - 2 - len(lead)) + lead


def _split_heads(x: mx.array, heads: int) -> mx.array:
    """(B, L, heads * D) → (B, heads, L, D)."""
    if not heads:
        raise Unsupported("packed attention without a number of heads")
    return x.reshape(x.shape[0], x.shape[1], heads, -1).transpose(0, 2, 1, 3)


def _mask(q: mx.array, k: mx.array, mask: Value | None, *, causal: bool) -> mx.array | str | None:
    rows, columns = q.shape[-2], k.shape[-2]
    if mask is None:
        if causal and rows == columns:
            return "causal"
        return _lower_triangle(rows, columns) if causal else None
    given = mask if isinstance(mask, mx.array) else to_device(mask, q.dtype)
    given = _lift(given.astype(q.dtype) if is_floating(given) else given)
    if not causal:
        return given
    allowed = _lower_triangle(rows, columns)
    if is_floating(given):
        return mx.where(allowed, given, mx.array(-mx.inf, given.dtype))
    return given & allowed


def _lower_triangle(rows: int, columns: int) -> mx.array:
    """(L, S) booleans: row i sees columns 0..i. MLX's own "causal" aligns the last row instead."""
    return mx.arange(rows)[:, None] >= mx.arange(columns)[None]


TABLE: Table = {
    "Sdpa": Operator(sdpa, keep_scalars=True, on_device=True),
    "Attention": Operator(attention, keep_scalars=True, host=frozenset()),
}
