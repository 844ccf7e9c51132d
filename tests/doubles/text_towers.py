"""Small text and picture towers for a batch of one, written as Immich's exports write them."""

from typing import Literal

import numpy as np
import onnx
from doubles.onnx_models import FLOAT, INT32, Array, ints
from doubles.towers import Tower

LENGTH, WIDTH, HEADS, WORDS, LAYERS = 9, 16, 2, 50, 2
DEPTH = WIDTH // HEADS
END = WORDS - 1

Pooling = Literal["gather", "gather_nd", "mean", "first", "last"]
Attention = Literal["written", "operator", "causal_operator"]


def causal_mask() -> Array:
    """(1, 1, LENGTH, LENGTH): what lies behind a token is minus infinity."""
    upper = np.triu(np.full((LENGTH, LENGTH), -np.inf), 1)
    return upper.astype(np.float32)[None, None]


def tokens(*words: int, padding: int = 0) -> Array:
    """A text: its words, the end token, padding."""
    row = [*words, END, *[padding] * LENGTH][:LENGTH]
    return np.array([row], np.int32)


def text_tower(
    pooling: Pooling = "gather",
    attention: Attention = "written",
    mask: Array | None = None,
) -> onnx.ModelProto:
    """A text tower; without a mask each token sees all."""
    tower = Tower(seed=5)
    words = tower.add("Gather", tower.weights(WORDS, WIDTH, scale=1.0), "text")
    x = tower.add("Add", words, tower.weights(LENGTH, WIDTH, scale=1.0))
    for _ in range(LAYERS):
        x = _layer(tower, x, attention, mask)
    return _pooled(tower, _norm(tower, x), pooling).model("text", INT32, [1, LENGTH])


def picture_tower(attention: Attention = "written") -> onnx.ModelProto:
    """A picture tower that reads its class token; the picture is its patches."""
    tower = Tower(seed=6)
    token = tower.weights(1, 1, WIDTH, scale=1.0)
    x = tower.add("Concat", token, "image", axis=1)
    for _ in range(LAYERS):
        x = _layer(tower, x, attention, None)
    return _pooled(tower, _norm(tower, x), "first").model("image", FLOAT, [1, LENGTH - 1, WIDTH])


def _norm(tower: Tower, x: str) -> str:
    return tower.add(
        "LayerNormalization", x, tower.weights(WIDTH, scale=1.0), tower.weights(WIDTH), axis=-1
    )


def _layer(tower: Tower, x: str, attention: Attention, mask: Array | None) -> str:
    first = tower.add("Transpose", _norm(tower, x), perm=[1, 0, 2])  # (LENGTH, 1, WIDTH)
    joined = tower.linear(first, WIDTH, 3 * WIDTH)
    split = tower.add("Reshape", joined, tower.const(ints(LENGTH, 1, 3, WIDTH)))
    turned = tower.add("Transpose", split, perm=[2, 0, 1, 3])
    query, keys, values = (
        _heads(tower, tower.add("Gather", turned, tower.const(np.array(i)), axis=0))
        for i in range(3)
    )
    mixed = _attend(tower, query, keys, values, attention, mask)
    back = tower.add("Transpose", mixed, perm=[2, 0, 1, 3])
    flat = tower.add("Reshape", back, tower.const(ints(LENGTH, WIDTH)))
    out = tower.add("Gemm", flat, tower.weights(WIDTH, WIDTH), tower.weights(WIDTH), transB=1)
    rows = tower.add("Reshape", out, tower.const(ints(LENGTH, 1, WIDTH)))
    x = tower.add("Add", x, tower.add("Transpose", rows, perm=[1, 0, 2]))
    inner = tower.activation(tower.linear(_norm(tower, x), WIDTH, 2 * WIDTH), "quick")
    return tower.add("Add", x, tower.linear(inner, 2 * WIDTH, WIDTH))


def _heads(tower: Tower, x: str) -> str:
    """(LENGTH, 1, WIDTH) → (1, HEADS, LENGTH, DEPTH)."""
    split = tower.add("Reshape", x, tower.const(ints(LENGTH, HEADS, DEPTH)))
    turned = tower.add("Transpose", split, perm=[1, 0, 2])
    return tower.add("Reshape", turned, tower.const(ints(1, HEADS, LENGTH, DEPTH)))


def _attend(
    tower: Tower, query: str, keys: str, values: str, attention: Attention, mask: Array | None
) -> str:
    if attention == "causal_operator":
        return tower.add("Attention", query, keys, values, is_causal=1)
    if attention == "operator":
        masks = () if mask is None else (tower.const(mask),)
        return tower.add("Attention", query, keys, values, *masks)
    turned = tower.add("Transpose", keys, perm=[0, 1, 3, 2])
    product = tower.add("MatMul", query, turned)
    scores = tower.add("Mul", product, tower.const(np.float32(DEPTH**-0.5)))
    scores = scores if mask is None else tower.add("Add", scores, tower.const(mask))
    return tower.add("MatMul", tower.add("Softmax", scores, axis=-1), values)


def _pooled(tower: Tower, x: str, pooling: Pooling) -> Tower:
    if pooling == "mean":
        row = tower.add("ReduceMean", x, tower.const(ints(1)), keepdims=0)
    elif pooling in ("first", "last"):
        place = tower.const(np.array(0 if pooling == "first" else LENGTH - 1))
        row = tower.add("Gather", x, place, axis=1)
    else:
        end = tower.add("ArgMax", "text", axis=-1, keepdims=0)
        row = _taken(tower, x, end, pooling)
    projected = tower.add("MatMul", row, tower.weights(WIDTH, WIDTH))
    tower.nodes[-1].output[0] = "embedding"
    assert projected
    return tower


def _taken(tower: Tower, x: str, end: str, pooling: Pooling) -> str:
    """x[0, end]: over the flattened rows (TorchScript), or with both places (dynamo)."""
    if pooling == "gather":
        flat = tower.add("Flatten", x, axis=2)
        place = tower.add("Add", end, tower.const(ints(0)))
        return tower.add("Gather", flat, place, axis=0)
    column = tower.add("Unsqueeze", end, tower.const(ints(-1)))
    places = tower.add("Concat", tower.const(np.zeros((1, 1), np.int64)), column, axis=-1)
    return tower.add("GatherND", x, places)


def opset23(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same at the opset that has an Attention."""
    model.opset_import[0].version = 23
    model.ir_version = 11
    return model
