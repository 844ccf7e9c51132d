"""Which activation a graph computes between its layers, read from the graph's structure.

Two exports of the same weights may differ in nothing else, and their vectors lie far apart: a
GELU by the error function, by tanh, or by a sigmoid (*quick*). Each is found written out and as one
node. Walks the skeleton of the file; no weight is read.
"""

import mmap
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from immich_ml_metal.onnx_files.protobuf import NotOnnx, messages

# Field numbers of onnx.proto3.
_MODEL_GRAPH, _MODEL_FUNCTION = 7, 25
_GRAPH_NODE, _GRAPH_INITIALIZER, _FUNCTION_NODE = 1, 5, 7
_NODE_INPUT, _NODE_OUTPUT, _NODE_OP, _NODE_ATTRIBUTE = 1, 2, 4, 5
_ATTRIBUTE_NAME, _ATTRIBUTE_STRING, _ATTRIBUTE_TENSOR = 1, 4, 5
_TENSOR_FLOATS, _TENSOR_NAME, _TENSOR_RAW = 4, 8, 9

_QUICK = 1.702  # x * sigmoid(1.702 x)
_TANH = (0.7978845608, 0.044715)  # sqrt(2 / pi) and the cube's factor
_FUSED = {"QuickGelu": "quick", "FastGelu": "tanh", "BiasGelu": "erf"}
_FLOAT_FORMATS = {2: "<e", 4: "<f", 8: "<d"}  # by size: float16, float32, float64

NONE = "none"  # a network that uses none of the three, such as a ResNet


@dataclass(slots=True)
class _Node:
    op: str = ""
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    strings: dict[str, str] = field(default_factory=dict)
    value: float | None = None  # of a Constant that holds one number


def read_activation(path: Path) -> str:
    """`erf`, `tanh`, `quick`, several joined by `+` where a graph mixes them, or `none`.

    Raises:
        NotOnnx: the file is torn or something else.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        if not path.stat().st_size:
            raise NotOnnx(f"{path} is empty")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            nodes, numbers = _Skeleton(view).read()
    producers = {name: node for node in nodes for name in node.outputs}
    numbers |= {n.outputs[0]: n.value for n in nodes if n.value is not None and n.outputs}
    found = Counter(kind for node in nodes if (kind := _kind(node, producers, numbers)))
    return "+".join(sorted(found)) or NONE


def _kind(node: _Node, producers: dict[str, _Node], numbers: dict[str, float]) -> str | None:
    """Which of the three this node is the heart of."""
    if node.op in _FUSED:
        return _FUSED[node.op]
    if node.op == "Gelu":
        return "tanh" if node.strings.get("approximate") == "tanh" else "erf"
    if node.op == "Erf":
        return "erf"
    if node.op in ("Sigmoid", "Tanh") and node.inputs:
        factors = _factors(producers.get(node.inputs[0]), numbers)
        if node.op == "Sigmoid":
            return "quick" if any(_is(factor, _QUICK) for factor in factors) else None
        return "tanh" if any(_is(f, known) for f in factors for known in _TANH) else None
    return None


def _factors(node: _Node | None, numbers: dict[str, float]) -> list[float]:
    """The numbers that a node multiplies by."""
    if node is None or node.op != "Mul":
        return []
    return [numbers[name] for name in node.inputs if name in numbers]


def _is(value: float, wanted: float) -> bool:
    return abs(value - wanted) < 1e-3 * wanted


class _Skeleton:
    """One pass over a model's messages: its nodes, and its tensors of one number."""

    def __init__(self, view: mmap.mmap) -> None:
        self._view = view

    def read(self) -> tuple[list[_Node], dict[str, float]]:
        nodes: list[_Node] = []
        numbers: dict[str, float] = {}
        for number, lo, hi in messages(self._view, 0, len(self._view)):
            is_function = number == _MODEL_FUNCTION
            if number != _MODEL_GRAPH and not is_function:
                continue
            for inner, start, end in messages(self._view, lo, hi):
                if inner == (_FUNCTION_NODE if is_function else _GRAPH_NODE):
                    nodes.append(self._node(start, end))
                elif inner == _GRAPH_INITIALIZER and not is_function:
                    numbers.update(self._number(start, end))
        return nodes, numbers

    def _node(self, start: int, end: int) -> _Node:
        node = _Node()
        for number, lo, hi in messages(self._view, start, end):
            if number == _NODE_OP:
                node.op = self._text(lo, hi)
            elif number == _NODE_INPUT:
                node.inputs.append(self._text(lo, hi))
            elif number == _NODE_OUTPUT:
                node.outputs.append(self._text(lo, hi))
            elif number == _NODE_ATTRIBUTE:
                self._attribute(node, lo, hi)
        return node

    def _attribute(self, node: _Node, start: int, end: int) -> None:
        name = ""
        for number, lo, hi in messages(self._view, start, end):
            if number == _ATTRIBUTE_NAME:
                name = self._text(lo, hi)
            elif number == _ATTRIBUTE_STRING:
                node.strings[name] = self._text(lo, hi)
            elif number == _ATTRIBUTE_TENSOR:
                node.value = next((value for _, value in self._number(lo, hi)), None)

    def _number(self, start: int, end: int) -> Iterator[tuple[str, float]]:
        """Name and value of a tensor that holds one floating-point number; else nothing."""
        name, value = "", None
        for number, lo, hi in messages(self._view, start, end):
            if number == _TENSOR_NAME:
                name = self._text(lo, hi)
            elif number in (_TENSOR_RAW, _TENSOR_FLOATS) and hi - lo in _FLOAT_FORMATS:
                (value,) = struct.unpack(_FLOAT_FORMATS[hi - lo], self._view[lo:hi])
        if value is not None:
            yield name, value

    def _text(self, start: int, end: int) -> str:
        return self._view[start:end].decode("utf-8", "replace")
