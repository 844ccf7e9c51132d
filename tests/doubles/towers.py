"""Deep transformers with random weights whose residual stream outgrows float16, as real ones do.

Some channels of large towers gather tens of thousands from layer to layer while every single
product stays small; the norms before each product take them out again.
"""

from dataclasses import dataclass, field

import numpy as np
import onnx
from doubles.onnx_models import FLOAT, INT32, Array, ints, make_model, node, value
from onnx import NodeProto

LAYERS, HEADS, DEPTH, LENGTH, VOCABULARY = 24, 4, 16, 12, 60
WIDTH = HEADS * DEPTH
GROWTH = 3300.0  # what each layer adds to a channel that grows: 24 of them pass 65,504
GROWING = (3, 40)


@dataclass
class Tower:
    """A network being written: nodes and their constants."""

    seed: int = 0
    nodes: list[NodeProto] = field(default_factory=list)
    constants: dict[str, Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.seed)

    def const(self, array: object) -> str:
        """Keep a constant; gives its name."""
        name = f"c{len(self.constants)}"
        self.constants[name] = np.asarray(array)
        return name

    def weights(self, *shape: int, scale: float | None = None) -> str:
        """Normal weights that keep the size of what they multiply."""
        spread = shape[0] ** -0.5 if scale is None else scale
        return self.const((self.random.standard_normal(shape) * spread).astype(np.float32))

    def add(self, op: str, *inputs: str, **attributes: object) -> str:
        """Append a node with one result; gives its name."""
        name = f"v{len(self.nodes)}"
        self.nodes.append(node(op, " ".join(inputs), name, **attributes))
        return name

    def norm(self, x: str) -> str:
        """LayerNorm whose gain makes up for the channels that grow."""
        gain = np.full(WIDTH, 30.0, np.float32)
        gain[list(GROWING)] = 0.05
        bias = self.weights(WIDTH, scale=0.02)
        return self.add("LayerNormalization", x, self.const(gain), bias, axis=-1)

    def linear(self, x: str, rows: int, columns: int, bias: Array | None = None) -> str:
        """x @ weights + bias, written out."""
        chosen = np.zeros(columns, np.float32) if bias is None else bias
        product = self.add("MatMul", x, self.weights(rows, columns))
        return self.add("Add", product, self.const(chosen))

    def heads(self, x: str) -> str:
        """(B, L, WIDTH) → (B, HEADS, L, DEPTH)."""
        split = self.add("Reshape", x, self.const(ints(0, -1, HEADS, DEPTH)))
        return self.add("Transpose", split, perm=[0, 2, 1, 3])

    def attention(self, query: str, source: str, mask: str = "") -> str:
        """Attention of `query` to `source`, scale and mask written out."""
        q, k, v = (self.heads(self.linear(x, WIDTH, WIDTH)) for x in (query, source, source))
        turned = self.add("Transpose", k, perm=[0, 1, 3, 2])
        scale = self.const(np.float32(DEPTH**-0.5))
        scores = self.add("Mul", self.add("MatMul", q, turned), scale)
        scores = self.add("Add", scores, mask) if mask else scores
        mixed = self.add("MatMul", self.add("Softmax", scores, axis=-1), v)
        joined = self.add("Transpose", mixed, perm=[0, 2, 1, 3])
        joined = self.add("Reshape", joined, self.const(ints(0, -1, WIDTH)))
        return self.linear(joined, WIDTH, WIDTH)

    def activation(self, x: str, kind: str) -> str:
        """GELU, QuickGELU or ReLU."""
        if kind == "quick":
            gate = self.add("Sigmoid", self.add("Mul", x, self.const(np.float32(1.702))))
            return self.add("Mul", x, gate)
        if kind == "relu":
            return self.add("Relu", x)
        inner = self.add("Erf", self.add("Div", x, self.const(np.float32(2**0.5))))
        shifted = self.add("Add", inner, self.const(np.float32(1)))
        return self.add("Mul", self.add("Mul", x, shifted), self.const(np.float32(0.5)))

    def layer(self, x: str, kind: str, mask: str = "") -> str:
        """One pre-norm layer; its last bias feeds the channels that grow."""
        normed = self.norm(x)
        x = self.add("Add", x, self.attention(normed, normed, mask))
        inner = self.activation(self.linear(self.norm(x), WIDTH, 2 * WIDTH), kind)
        fed = np.zeros(WIDTH, np.float32)
        fed[list(GROWING)] = GROWTH, -GROWTH
        return self.add("Add", x, self.linear(inner, 2 * WIDTH, WIDTH, fed))

    def vector(self, x: str) -> None:
        """Project (B, WIDTH) and give it length one, as `embedding`."""
        projected = self.add("MatMul", x, self.weights(WIDTH, WIDTH))
        length = self.add("ReduceL2", projected, self.const(ints(-1)), keepdims=1)
        self.nodes.append(node("Div", f"{projected} {length}", "embedding"))

    def model(self, name: str, kind: int, shape: list[int | None]) -> onnx.ModelProto:
        """The finished model with one input."""
        output = value("embedding", FLOAT, ["rows", WIDTH])
        return make_model(self.nodes, [value(name, kind, shape)], [output], self.constants)


def _patches(tower: Tower) -> str:
    """(B, 3, 16, 12) picture → (B, LENGTH, WIDTH)."""
    kernel = tower.const((tower.random.standard_normal((WIDTH, 3, 4, 4)) * 0.15).astype(np.float32))
    squares = tower.add("Conv", "image", kernel, strides=[4, 4])
    flat = tower.add("Reshape", squares, tower.const(ints(0, WIDTH, LENGTH)))
    turned = tower.add("Transpose", flat, perm=[0, 2, 1])
    return tower.add("Add", turned, tower.weights(LENGTH, WIDTH, scale=0.5))


PICTURE: list[int | None] = [None, 3, 16, 12]


def siglip2_like() -> onnx.ModelProto:
    """Picture tower with GELU and a pooling head that attends with a query of its own."""
    tower = Tower(seed=1)
    x = _patches(tower)
    for _ in range(LAYERS):
        x = tower.layer(x, "gelu")
    x = tower.norm(x)
    probe = tower.add("Expand", tower.weights(1, 1, WIDTH, scale=1.0), _rows(tower))
    pooled = tower.add("Squeeze", tower.attention(probe, x), tower.const(ints(1)))
    tower.vector(pooled)
    return tower.model("image", FLOAT, PICTURE)


def _rows(tower: Tower) -> str:
    rows = tower.add("Gather", tower.add("Shape", "image"), tower.const(ints(0)))
    return tower.add("Concat", rows, tower.const(ints(1, WIDTH)), axis=0)


def vit_l_like() -> onnx.ModelProto:
    """Picture tower with QuickGELU and a class token."""
    tower = Tower(seed=2)
    token = tower.add("Expand", tower.weights(1, 1, WIDTH, scale=0.5), _rows(tower))
    x = tower.norm(tower.add("Concat", token, _patches(tower), axis=1))
    for _ in range(LAYERS):
        x = tower.layer(x, "quick")
    first = tower.add("Gather", x, tower.const(np.array(0, np.int64)), axis=1)
    tower.vector(tower.norm(first))
    return tower.model("image", FLOAT, PICTURE)


def nllb_like() -> onnx.ModelProto:
    """Text tower with ReLU, scaled embeddings, a padding mask and a mean over the words."""
    tower = Tower(seed=3)
    words = tower.add("Gather", tower.weights(VOCABULARY, WIDTH, scale=0.12), "text")
    scaled = tower.add("Mul", words, tower.const(np.float32(WIDTH**0.5)))
    x = tower.add("Add", scaled, tower.weights(LENGTH, WIDTH, scale=0.7))
    is_word = tower.add("Not", tower.add("Equal", "text", tower.const(np.int32(1))))
    seen = tower.add("Cast", is_word, to=FLOAT)
    hidden = tower.add("Sub", tower.const(np.float32(1)), seen)
    lowest = tower.const(np.finfo(np.float32).min)
    mask = tower.add("Unsqueeze", tower.add("Mul", hidden, lowest), tower.const(ints(1, 2)))
    for _ in range(LAYERS):
        x = tower.layer(x, "relu", mask)
    x = tower.norm(x)
    weights = tower.add("Unsqueeze", seen, tower.const(ints(2)))
    total = tower.add("ReduceSum", tower.add("Mul", x, weights), tower.const(ints(1)), keepdims=0)
    tower.vector(
        tower.add("Div", total, tower.add("ReduceSum", weights, tower.const(ints(1)), keepdims=0))
    )
    return tower.model("text", INT32, [None, LENGTH])
