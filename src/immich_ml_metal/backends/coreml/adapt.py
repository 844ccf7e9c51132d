"""What ONNX Runtime's Core ML provider refuses, said in operators that it takes.

A node that is refused runs on the CPU and cuts the graph in two. Each pass changes a model that is
pinned to fixed shapes, in memory, and what it computes stays the same to rounding; tests compare
each with ONNX Runtime on the CPU. Each goes when the provider takes what it replaces.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper

from immich_ml_metal.backends.coreml.edit import ModelEditor

OPSET = 20  # the newest that the provider is known to take
_CHANGED_SINCE = frozenset(  # in more than the types they take, or newer than OPSET
    {"Attention", "RMSNormalization", "RotaryEmbedding", "Swish", "TensorScatter"}
    | {"GroupNormalization", "QuantizeLinear", "DequantizeLinear"}
)
_MOVES = frozenset({"Transpose", "Reshape", "Squeeze", "Unsqueeze", "Identity", "Flatten"})
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)
Pass = Callable[[ModelEditor], bool]  # whether it changed anything


def adapt(model: ModelProto) -> tuple[str, ...]:
    """Change a pinned model in place; gives the names of the passes that did something."""
    return tuple(name for name, run in PASSES.items() if run(ModelEditor(model)))


def take_bytes_as_floats(editor: ModelEditor) -> bool:
    """Inputs of bytes that only become floats → inputs of floats; the caller gives them so."""
    changed = False
    for value in editor.model.graph.input:
        kind = value.type.tensor_type
        if kind.elem_type == TensorProto.UINT8 and _only_becomes_float(editor, value.name):
            kind.elem_type = TensorProto.FLOAT
            changed = True
    return changed


def _only_becomes_float(editor: ModelEditor, name: str) -> bool:
    if any(output.name == name for output in editor.model.graph.output):
        return False
    users = [node for node in editor.model.graph.node if name in node.input]
    for node in users:
        to_float = node.op_type == "Cast" and editor.attributes(node)["to"] in _FLOATS
        moved = node.op_type in _MOVES and _only_becomes_float(editor, node.output[0])
        if not to_float and not moved:
            return False
    return bool(users)


def write_attention_out(editor: ModelEditor) -> bool:
    """Attention (opset 23) → two products and a softmax."""
    nodes = editor.nodes("Attention")
    if not nodes:
        return False
    facts = Facts(editor.shapes(), editor.types())
    written = {node.output[0]: _attention(editor, node, facts) for node in nodes}
    done = {name: made for name, made in written.items() if made}
    editor.replace(done)
    return bool(done)


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of each value: its shape and its type."""

    shapes: Mapping[str, tuple[int, ...]]
    types: Mapping[str, int]


def _attention(editor: ModelEditor, node: NodeProto, facts: Facts) -> list[NodeProto]:
    """The nodes that compute it; none where it has a cache, a cap, or unequal heads."""
    given = editor.attributes(node)
    q, k, v, mask = [*node.input, ""][:4]
    q_shape, k_shape = facts.shapes.get(q, ()), facts.shapes.get(k, ())
    heads, others = (int(given.get(f"{one}_num_heads", 0)) for one in ("q", "kv"))
    is_plain = not any(node.input[4:]) and not any(node.output[1:]) and not given.get("softcap")
    packed = bool(heads)
    fits = len(q_shape) == len(k_shape) == (3 if packed else 4)
    if not is_plain or not fits or (heads != others if packed else q_shape[1] != k_shape[1]):
        return []
    made = _Written(editor, node.name or node.output[0], facts.types.get(q) == TensorProto.FLOAT16)
    if packed:
        q, k, v = (made.split_heads(name, heads) for name in (q, k, v))
    depth = q_shape[-1] // heads if packed else q_shape[-1]
    scaled = made.add("Mul", q, made.number(given.get("scale") or depth**-0.5))
    scores = made.add("MatMul", scaled, made.add("Transpose", k, perm=[0, 1, 3, 2]))
    if mask:
        is_float = facts.types.get(mask, TensorProto.FLOAT) in _FLOATS
        scores = made.add("Add", scores, mask if is_float else made.hiding(mask))
    if given.get("is_causal"):
        scores = made.add("Add", scores, made.causal(q_shape[-2], k_shape[-2]))
    result = made.add("MatMul", made.add("Softmax", scores, axis=-1), v)
    if packed:
        made.join_heads(result)
    made.nodes[-1].output[0] = node.output[0]
    return made.nodes


class _Written:
    """Nodes written out in place of one, in the type of the network."""

    def __init__(self, editor: ModelEditor, name: str, is_half: bool) -> None:
        self._editor = editor
        self._name = name
        self._dtype = np.float16 if is_half else np.float32
        self._lowest = float(np.finfo(self._dtype).min)
        self.nodes: list[NodeProto] = []

    def add(self, op: str, *inputs: str, **attributes: Any) -> str:
        output = f"{self._name}.{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [output], output, **attributes))
        return output

    def number(self, value: object) -> str:
        return self._editor.constant(np.asarray(value, self._dtype))

    def _lengths(self, *values: int) -> str:
        return self._editor.constant(np.asarray(values, np.int64))

    def split_heads(self, name: str, heads: int) -> str:
        split = self.add("Reshape", name, self._lengths(0, 0, heads, -1))
        return self.add("Transpose", split, perm=[0, 2, 1, 3])

    def join_heads(self, name: str) -> str:
        turned = self.add("Transpose", name, perm=[0, 2, 1, 3])
        return self.add("Reshape", turned, self._lengths(0, 0, -1))

    def hiding(self, mask: str) -> str:
        """What hides, where it is added, the places that a mask of booleans does not select."""
        return self.add("Where", mask, self.number(0), self.number(self._lowest))

    def causal(self, rows: int, columns: int) -> str:
        """What hides later places: row i sees the columns 0..i."""
        return self.number(np.where(np.tri(rows, columns, dtype=np.bool_), 0, self._lowest))


def write_length_out(editor: ModelEditor) -> bool:
    """ReduceL2 → the root of a sum of squares."""
    nodes = editor.nodes("ReduceL2")
    done: dict[str, list[NodeProto]] = {}
    for node in nodes:
        name = node.name or node.output[0]
        squares, total = f"{name}.squares", f"{name}.sum"
        inputs, given = [squares, *node.input[1:]], editor.attributes(node)
        axes = given.pop("axes", None)
        if axes is not None and editor.opset >= 13:  # ReduceSum takes them as an input since
            inputs.append(editor.constant(np.asarray(axes, np.int64)))
        elif axes is not None:
            given["axes"] = axes
        written = [
            helper.make_node("Mul", [node.input[0]] * 2, [squares], squares),
            helper.make_node("ReduceSum", inputs, [total], total, **given),
            helper.make_node("Sqrt", [total], node.output, name),
        ]
        done[node.output[0]] = written
    editor.replace(done)
    return bool(done)


def round_pools_down(editor: ModelEditor) -> bool:
    """Pools with `ceil_mode` → without, where the result is the same; MaxPool is padded for it."""
    nodes = [
        node
        for node in editor.nodes("MaxPool", "AveragePool")
        if editor.attributes(node).get("ceil_mode") and len(node.output) == 1
    ]
    shapes = editor.shapes() if nodes else {}
    changed = False
    for node in nodes:
        pads = _pads_without_ceiling(editor, node, shapes)
        if pads is None:
            continue
        replaced = {"ceil_mode", "pads", *(["auto_pad"] if pads else [])}
        for attribute in [a for a in node.attribute if a.name in replaced]:
            node.attribute.remove(attribute)
        if pads:
            node.attribute.append(helper.make_attribute("pads", pads))
        changed = True
    return changed


def _pads_without_ceiling(
    editor: ModelEditor, node: NodeProto, shapes: Mapping[str, tuple[int, ...]]
) -> list[int] | None:
    """The pads with which rounding down gives the same; None where there are none."""
    given = editor.attributes(node)
    if given.get("auto_pad", b"NOTSET") in (b"SAME_UPPER", b"SAME_LOWER"):
        return []  # the length follows from the stride alone
    before, after = shapes.get(node.input[0]), shapes.get(node.output[0])
    if before is None or after is None:
        return None
    kernel = _integers(given, "kernel_shape", [])
    places = len(kernel)
    strides, dilations = (_integers(given, name, [1] * places) for name in ("strides", "dilations"))
    pads = _integers(given, "pads", [0] * 2 * places)
    for axis in range(places):
        reach = (kernel[axis] - 1) * dilations[axis] + 1
        wanted = (after[2 + axis] - 1) * strides[axis] + reach
        missing = wanted - (before[2 + axis] + pads[axis] + pads[places + axis])
        if missing > 0 and node.op_type != "MaxPool":
            return None  # an average would count what it is padded with
        pads[places + axis] += max(missing, 0)
        if pads[places + axis] >= kernel[axis]:
            return None  # a window wholly past the end
    return pads


def _integers(given: Mapping[str, Any], name: str, default: list[int]) -> list[int]:
    return [int(each) for each in given.get(name, default)]


def declare_older_opset(editor: ModelEditor) -> bool:
    """Opset 21 and newer → 20, where all operators mean the same in it."""
    ops = {node.op_type for node in editor.model.graph.node}
    if editor.opset <= OPSET or ops & _CHANGED_SINCE:
        return False
    for opset in editor.model.opset_import:
        if opset.domain in ("", "ai.onnx"):
            opset.version = OPSET
    return True


PASSES: Mapping[str, Pass] = MappingProxyType(
    {
        "bytes": take_bytes_as_floats,
        "attention": write_attention_out,
        "length": write_length_out,
        "ceil_mode": round_pools_down,
        "opset": declare_older_opset,
    }
)
