"""From a graph that takes one row to one that takes any number, with the same kernels.

Immich's legacy exports have a batch of 1 written into their shapes. The invariant kept here: every
value of the rewritten graph is, along one known axis, the concatenation of what the original graph
gives for each row (or their interleaving, where an exporter merged the rows into the end of another
axis). An operator is accepted only with a rule under which that remains true, so rows cannot touch
each other. Whatever rearranges elements without changing their order becomes a Reshape
with -1 at that axis; positions counted from the start of a row are shifted to their row; constants
that must line up with the rows are repeated.
"""

import math
from collections.abc import Callable, Mapping

import numpy as np

from immich_ml_metal.onnx_mlx.executor import infer_shapes
from immich_ml_metal.onnx_mlx.fold import static_shapes
from immich_ml_metal.onnx_mlx.graph import Attribute, Node, Program, prune, replace_body
from immich_ml_metal.types import Tensor, TensorSpec

RESHAPES = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze"})
PICTURES = frozenset(
    "Conv ConvTranspose MaxPool AveragePool GlobalAveragePool GlobalMaxPool BatchNormalization "
    "InstanceNormalization GroupNormalization Resize DepthToSpace SpaceToDepth".split()
)
UNARY = frozenset(
    "Abs Neg Not Sqrt Reciprocal Exp Log Sin Cos Tanh Erf Sign Floor Ceil Round IsNaN IsInf Identity "
    "Dropout Relu LeakyRelu Elu Sigmoid HardSigmoid HardSwish Swish Gelu Softplus Mish Clip Cast "
    "CastLike".split()
)
BROADCAST = frozenset(
    "Add Sub Mul Div Mod Pow Equal Greater GreaterOrEqual Less LessOrEqual And Or Xor Max Min Sum "
    "Mean Where PRelu".split()
)
REDUCE = frozenset(
    "ReduceSum ReduceMean ReduceMax ReduceMin ReduceProd ReduceL1 ReduceL2 ReduceSumSquare "
    "ReduceLogSumExp".split()
)
INTERLEAVED = RESHAPES | UNARY | {"Gemm"}  # what does not care about the order of the rows
ALONG = frozenset("Softmax LogSoftmax CumSum TopK Split ArgMax ArgMin LpNormalization".split())


class _Refused(Exception):
    """No rule keeps the rows apart here."""


def free_batch(program: Program) -> tuple[Program, str]:
    """Let a program with a fixed batch of 1 take any number of rows.

    Returns:
        The program, and why it is unchanged; an empty reason means that it was rewritten.
    """
    shapes = static_shapes(program)
    if shapes is None:
        return program, "its input shapes are free already"
    if any(not shape or shape[0] != 1 for shape in shapes.values()):
        return program, "its inputs do not start with a batch of 1"
    rewriter = _Rewriter(program, shapes)
    try:
        return rewriter.run(), ""
    except _Refused as exc:
        return program, str(exc)


class _Rewriter:
    def __init__(self, program: Program, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._program = program
        values = infer_shapes(program, shapes)
        self._shapes = {name: tuple(value.shape) for name, value in values.items()}
        self._axis = dict.fromkeys(shapes, 0)  # value name → axis that holds the rows
        self._outer: dict[str, int] = {}  # value name → elements of that axis outside the rows
        self._constants = dict(program.constants)
        self.opset = program.opset
        self._nodes: list[Node] = []
        self._counter = next(iter(shapes))  # an input tells the number of rows

    def run(self) -> Program:
        for node in self._program.nodes:
            if any(name in self._axis for name in node.inputs):
                self._rewrite(node)
            else:
                self._nodes.append(node)
        for name in self._program.output_names:
            if self._axis.get(name) != 0 or self._shapes[name][0] != 1:
                raise _Refused(f"output {name!r} does not hold one row for each input row")
        program = replace_body(self._program, tuple(self._nodes), self._constants)
        return prune(_with_free_batch(program))

    def _rewrite(self, node: Node) -> None:
        rule = _RULES.get(node.op)
        if rule is None:
            raise _Refused(f"no rule for {node}")
        interleaved = max(self._outer.get(name, 1) for name in node.inputs)
        if interleaved > 1 and node.op not in INTERLEAVED:
            raise _Refused(f"{node} gets interleaved rows")
        axis = rule(self, node)
        if interleaved > 1 and node.op not in RESHAPES:
            self._outer.update(dict.fromkeys(node.outputs, interleaved))
        for name in node.outputs:
            if name:
                self._axis[name] = axis

    # -- what rules are made of ---------------------------------------------------------------

    def emit(
        self, node: Node, *, op: str = "", inputs: tuple[str, ...] = (), **extra: Attribute
    ) -> None:
        """Add the node to the new program, changed as told."""
        attributes = {**node.attributes, **extra}
        self._nodes.append(
            Node(op or node.op, inputs or node.inputs, node.outputs, attributes, node.name)
        )

    def carried(self, node: Node, *positions: int) -> int:
        """The axis of the one input (of those at `positions`) that holds rows; others must not."""
        carriers = [i for i, name in enumerate(node.inputs) if name in self._axis]
        if set(carriers) - set(positions or (0,)):
            raise _Refused(f"rows reach {node} through input {carriers[-1]}")
        return self._axis[node.inputs[carriers[0]]]

    def axis(self, name: str) -> int | None:
        """The axis of a value that holds the rows, or None."""
        return self._axis.get(name)

    def outer(self, name: str) -> int:
        """How many groups of rows the axis holds: 1 unless the rows are interleaved."""
        return self._outer.get(name, 1)

    def interleave(self, name: str, outer: int) -> None:
        """Note that the rows of a value are interleaved."""
        self._outer[name] = outer

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape for one row."""
        return self._shapes[name]

    def attribute_axis(self, node: Node, default: int = 0) -> int:
        """The node's `axis`, counted from the start."""
        axis = node.attributes.get("axis", default)
        if not isinstance(axis, int):
            raise _Refused(f"{node} has no single axis")
        return axis % len(self._shapes[node.inputs[0]])

    def list_of(self, node: Node, name: str, position: int) -> list[int] | None:
        """A list in an attribute or a constant input."""
        given = node.attributes.get(name)
        if isinstance(given, tuple):
            return [int(v) for v in given]
        if len(node.inputs) > position and node.inputs[position]:
            value = self._constants.get(node.inputs[position])
            if value is None:
                raise _Refused(f"{node} takes {name} from the data")
            return [int(v) for v in value.ravel()]
        return None

    def add_constant(self, near: str, value: Tensor) -> str:
        """Store a constant that belongs to the value `near`."""
        name = f"{near}@rows"
        self._constants[name] = value
        return name

    def repeat(self, name: str, axis: int) -> str:
        """A constant repeated for each row along `axis`."""
        repeated = f"{name}@rows{axis}"
        if repeated not in {n.outputs[0] for n in self._nodes if n.op == "ExpandBatch"}:
            attributes: dict[str, Attribute] = {"axis": axis}
            inputs = (name, self._counter)
            self._nodes.append(Node("ExpandBatch", inputs, (repeated,), attributes, name))
        return repeated

    @property
    def counter(self) -> str:
        """A value with one element of its first axis for each row."""
        return self._counter

    def refuse_if(self, condition: bool, node: Node) -> None:  # noqa: FBT001
        """Give up on a node that mixes rows."""
        if condition:
            raise _Refused(f"{node} works across rows")


Rule = Callable[[_Rewriter, Node], int]


def _unary(rows: _Rewriter, node: Node) -> int:
    axis = rows.carried(node)
    rows.emit(node)
    return axis


def _reshape(rows: _Rewriter, node: Node) -> int:
    """The rows lie where as many elements come before them as in the input."""
    source, target = node.inputs[0], node.outputs[0]
    axis = rows.carried(node)
    before = math.prod(rows.shape(source)[:axis]) * rows.outer(source)
    found = _place(rows.shape(target), before)
    rows.refuse_if(found is None, node)
    axis, outer = found or (0, 1)
    if outer > 1:
        rows.interleave(target, outer)
    shape = [-1 if a == axis else length for a, length in enumerate(rows.shape(target))]
    given = rows.add_constant(target, np.asarray(shape, np.int64))
    rows.emit(node, op="Reshape", inputs=(source, given))
    return axis


def _place(shape: tuple[int, ...], before: int) -> tuple[int, int] | None:
    """(axis, outer) for rows that follow `before` elements of a value with this shape for one row.

    An axis of length 1 is theirs; else they come first on the axis that starts there (batch times
    heads); else, and rather than among the features on the last axis, last on the one that ends
    there (length times batch).
    """
    starts = [axis for axis in range(len(shape)) if math.prod(shape[:axis]) == before]
    alone = [axis for axis in starts if shape[axis] == 1]
    if alone or (starts and (starts[0] == 0 or starts[0] < len(shape) - 1)):
        return (alone or starts)[0], 1
    for axis in range(len(shape)):
        if math.prod(shape[: axis + 1]) == before:
            return axis, shape[axis]
    return None


def _broadcast(rows: _Rewriter, node: Node) -> int:
    rank = len(rows.shape(node.outputs[0]))
    places = {
        axis + rank - len(rows.shape(name))
        for name in node.inputs
        if (axis := rows.axis(name)) is not None
    }
    rows.refuse_if(len(places) != 1, node)
    (place,) = places
    inputs = tuple(_aligned(rows, node, name, place, rank) for name in node.inputs)
    rows.emit(node, inputs=inputs)
    return place


def _aligned(rows: _Rewriter, node: Node, name: str, place: int, rank: int) -> str:
    """An operand whose length at the rows' axis fits: as many elements for each row, or one in all."""
    shape, wanted = rows.shape(name), rows.shape(node.outputs[0])[place]
    own = place - (rank - len(shape))
    length = shape[own] if own >= 0 else 1
    if rows.axis(name) is not None:
        rows.refuse_if(length != wanted, node)
        return name
    if length == 1 and (wanted == 1 or own < 0):
        return name
    rows.refuse_if(length != wanted and length != 1, node)
    return name if length == 1 else rows.repeat(name, own)


def _matmul(rows: _Rewriter, node: Node) -> int:
    left, right = node.inputs
    x, y, out = (len(rows.shape(name)) for name in (left, right, node.outputs[0]))
    a, b = rows.axis(left), rows.axis(right)
    rows.refuse_if(min(x, y) < 2, node)  # noqa: PLR2004 - vectors
    if b is None and y == 2 and a is not None:  # noqa: PLR2004
        rows.refuse_if(a == x - 1, node)
        rows.emit(node)
        return a
    if a is None and b == y - 1:
        rows.refuse_if(x > 2, node)  # noqa: PLR2004
        rows.emit(node)
        return out - 1
    places = {axis + out - rank for axis, rank in ((a, x), (b, y)) if axis is not None}
    rows.refuse_if(len(places) != 1, node)
    (place,) = places
    if b is None and place == out - 2:
        rows.refuse_if(any(n != 1 for n in rows.shape(right)[:-2]), node)
        rows.emit(node)
        return place
    rows.refuse_if(place >= out - 2, node)
    rows.emit(node, inputs=tuple(_aligned(rows, node, name, place, out) for name in node.inputs))
    return place


def _gemm(rows: _Rewriter, node: Node) -> int:
    axis = rows.carried(node)
    rows.refuse_if(axis != 0 or bool(node.attributes.get("transA")), node)
    inputs = node.inputs
    if len(inputs) > 2 and inputs[2]:  # noqa: PLR2004
        bias = rows.shape(inputs[2])
        rows.refuse_if(len(bias) > 1 and bias[0] != 1, node)
    rows.emit(node)
    return 0


def _norm(rows: _Rewriter, node: Node) -> int:
    axis = rows.carried(node)
    rows.refuse_if(axis >= rows.attribute_axis(node, -1), node)
    rows.emit(node)
    return axis


def _along(rows: _Rewriter, node: Node) -> int:
    """An operator that works along one axis, which must not be the rows' own."""
    axis = rows.carried(node)
    default = 0 if node.op in ("ArgMax", "ArgMin", "Split") else -1
    if node.op == "CumSum":
        given = rows.list_of(node, "axis", 1) or [0]
        along = given[0] % len(rows.shape(node.inputs[0]))
    else:
        along = rows.attribute_axis(node, default)
    flattens = rows.opset < 13 and node.op in ("Softmax", "LogSoftmax")  # noqa: PLR2004
    rows.refuse_if(along == axis or (flattens and along < axis), node)
    rows.emit(node)
    dropped = node.op in ("ArgMax", "ArgMin") and not node.attributes.get("keepdims", 1)
    return axis - 1 if dropped and along < axis else axis


def _reduce(rows: _Rewriter, node: Node) -> int:
    axis = rows.carried(node)
    rank = len(rows.shape(node.inputs[0]))
    axes = [a % rank for a in rows.list_of(node, "axes", 1) or range(rank)]
    rows.refuse_if(axis in axes, node)
    rows.emit(node)
    if node.attributes.get("keepdims", 1):
        return axis
    return axis - sum(a < axis for a in axes)


def _picture(rows: _Rewriter, node: Node) -> int:
    axis = rows.carried(node)
    rows.refuse_if(axis != 0, node)
    if node.op == "Resize" and len(node.inputs) > 3:  # noqa: PLR2004 - sizes name the batch too
        sizes, old = rows.list_of(node, "sizes", 3), rows.shape(node.inputs[0])
        rows.refuse_if("axes" in node.attributes or not sizes, node)
        scales = np.asarray([new / before for new, before in zip(sizes or (), old, strict=True)])
        given = rows.add_constant(node.outputs[0], scales.astype(np.float32))
        rows.emit(node, inputs=(*node.inputs[:2], given))
    else:
        rows.emit(node)
    return 0


def _transpose(rows: _Rewriter, node: Node) -> int:
    axis = rows.carried(node)
    perm = node.attributes.get("perm") or tuple(range(len(rows.shape(node.inputs[0]))))[::-1]
    rows.emit(node)
    return list(perm).index(axis)  # type: ignore[arg-type]


def _expand(rows: _Rewriter, node: Node) -> int:
    before = rows.carried(node)
    old, new = rows.shape(node.inputs[0]), rows.shape(node.outputs[0])
    axis = before + len(new) - len(old)
    rows.refuse_if(old[before] != new[axis], node)
    shape = [1 if a == axis else length for a, length in enumerate(new)]
    given = rows.add_constant(node.outputs[0], np.asarray(shape, np.int64))
    rows.emit(node, inputs=(node.inputs[0], given))
    return axis


def _concat(rows: _Rewriter, node: Node) -> int:
    axes = {axis for name in node.inputs if (axis := rows.axis(name)) is not None}
    rows.refuse_if(len(axes) != 1, node)
    (axis,) = axes
    rows.refuse_if(axis == rows.attribute_axis(node), node)
    inputs = [n if rows.axis(n) is not None else rows.repeat(n, axis) for n in node.inputs]
    rows.emit(node, inputs=tuple(inputs))
    return axis


def _slice(rows: _Rewriter, node: Node) -> int:
    axis = rows.carried(node)
    rank = len(rows.shape(node.inputs[0]))
    starts = rows.list_of(node, "starts", 1) or []
    axes = rows.list_of(node, "axes", 3) or list(range(len(starts)))
    rows.refuse_if(axis in [a % rank for a in axes], node)
    rows.emit(node)
    return axis


def _pad(rows: _Rewriter, node: Node) -> int:
    axis = rows.carried(node)
    rank = len(rows.shape(node.inputs[0]))
    pads = rows.list_of(node, "pads", 1) or []
    axes = [a % rank for a in rows.list_of(node, "axes", 3) or range(rank)]
    touched = [a for i, a in enumerate(axes) if pads[i] or pads[i + len(axes)]]
    rows.refuse_if(axis in touched, node)
    rows.emit(node)
    return axis


def _gather(rows: _Rewriter, node: Node) -> int:
    data, index = node.inputs
    along = rows.attribute_axis(node)
    places = len(rows.shape(index))
    a, i = rows.axis(data), rows.axis(index)
    if a is None and i is not None:
        rows.emit(node)
        return along + i
    if a is not None and a != along and i is None:
        rows.emit(node)
        return a if a < along else a + places - 1
    rows.refuse_if(a != along, node)
    if i is None:  # the same places of each row: they need an axis to put the rows on
        rows.refuse_if(1 not in rows.shape(index), node)
        i = rows.shape(index).index(1)
    rows.emit(node, op="GatherRows", inputs=(data, index, rows.counter), index_axis=i)
    return along + i


def _gather_elements(rows: _Rewriter, node: Node) -> int:
    places = {axis for name in node.inputs if (axis := rows.axis(name)) is not None}
    rows.refuse_if(len(places) != 1, node)
    (axis,) = places
    rows.refuse_if(axis == rows.attribute_axis(node), node)
    lengths = {rows.shape(name)[axis] for name in node.inputs}
    rows.refuse_if(len(lengths) != 1, node)
    inputs = [n if rows.axis(n) is not None else rows.repeat(n, axis) for n in node.inputs]
    rows.emit(node, inputs=tuple(inputs))
    return axis


def _gather_nd(rows: _Rewriter, node: Node) -> int:
    data, index = node.inputs
    a, i = rows.axis(data), rows.axis(index)
    rank = len(rows.shape(index))
    rows.refuse_if(bool(node.attributes.get("batch_dims")) or i is None or i == rank - 1, node)
    if a is None:
        rows.emit(node)
    else:
        rows.refuse_if(a >= rows.shape(index)[-1], node)
        inputs = (data, index, rows.counter)
        rows.emit(node, op="GatherNDRows", inputs=inputs, data_axis=a, index_axis=i or 0)
    return i or 0


def _attention(rows: _Rewriter, node: Node) -> int:
    """Rows on the first axis of q, k and v; a mask without rows must not have them either."""
    rows.refuse_if(any(rows.axis(name) != 0 for name in node.inputs[:3]), node)
    if len(node.inputs) > 3 and node.inputs[3]:  # noqa: PLR2004
        mask, rank = node.inputs[3], 4
        if rows.axis(mask) is None:
            shape = rows.shape(mask)
            rows.refuse_if(len(shape) == rank and shape[0] != 1, node)
        else:
            rows.refuse_if(rows.axis(mask) != 0 or len(rows.shape(mask)) != rank, node)
    rows.emit(node)
    return 0


_RULES: Mapping[str, Rule] = {
    **dict.fromkeys(UNARY, _unary),
    **dict.fromkeys(RESHAPES, _reshape),
    **dict.fromkeys(BROADCAST, _broadcast),
    **dict.fromkeys(REDUCE, _reduce),
    **dict.fromkeys(PICTURES, _picture),
    **dict.fromkeys(ALONG, _along),
    "MatMul": _matmul,
    "Gemm": _gemm,
    "LayerNormalization": _norm,
    "RMSNormalization": _norm,
    "Transpose": _transpose,
    "Expand": _expand,
    "Concat": _concat,
    "Slice": _slice,
    "Pad": _pad,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "Attention": _attention,
}


def _with_free_batch(program: Program) -> Program:
    def free(spec: TensorSpec) -> TensorSpec:
        return TensorSpec(spec.name, spec.dtype, (None, *spec.shape[1:]))

    return Program(
        program.name,
        program.nodes,
        program.constants,
        tuple(free(spec) for spec in program.inputs),
        tuple(free(spec) for spec in program.outputs),
        program.opset,
        program.metadata,
    )
