"""From the file's program to the one that runs: fold, free the batch, fuse, lay out."""

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial

from immich_ml_metal.onnx_graph.axes import Shapes
from immich_ml_metal.onnx_graph.graph import Node, Program
from immich_ml_metal.onnx_graph.rewriting import rewrite
from immich_ml_metal.onnx_mlx.executor import infer_shapes, require_operators
from immich_ml_metal.onnx_mlx.fold import fold_constants, fold_shapes, static_shapes
from immich_ml_metal.onnx_mlx.passes import PASSES
from immich_ml_metal.onnx_mlx.passes.batch import free_batch
from immich_ml_metal.onnx_mlx.passes.mixed import mix

FUSED = frozenset(  # operators that passes make out of several
    ["Sdpa", "Linear", "LayerNormalization", "Gelu", "Swish", "HardSwish", "HardSigmoid"]
)


@dataclass(frozen=True, slots=True)
class Lowered:
    """A program ready to run, and what was done to it.

    Attributes:
        batched: whether it takes any number of rows.
        reason: why the batch could not be freed, else empty.
        fused: how many operations of each kind the passes made.
    """

    program: Program
    batched: bool
    reason: str
    fused: Mapping[str, int]


Remark = Callable[[str, Node, str], None]  # pass, node, why it was left alone


def _silent(name: str, node: Node, reason: str) -> None:
    """The service wants the program alone."""


def lower(
    program: Program,
    *,
    skip: Collection[str] = (),
    mixed: bool = False,
    remark: Remark = _silent,
) -> Lowered:
    """Run every pass but those in `skip` (names of `PASSES`, of rewritings, and `batch`).

    `mixed` gives the operands of products 16 bits; `remark` is told of each node that a pass
    looked at and left alone, and why.

    Raises:
        LoadFailed: an operator has no translation.
    """
    require_operators(program)
    program = fold_constants(fold_shapes(fold_constants(program)))
    shapes = static_shapes(program)
    reason = "not asked for"
    if "batch" not in skip:
        program, reason = free_batch(program, partial(remark, "batch"))
    if shapes is not None:
        program = _read_less(program, shapes, is_free=not reason, skip=skip, remark=remark)
    before = Counter(node.op for node in program.nodes)
    for name, run in PASSES.items():
        if name not in skip:
            program = run(program, partial(remark, name))
    if mixed:
        program = mix(program)
    return Lowered(program, _takes_rows(program), reason, _fused(program, before))


def _fused(program: Program, before: Mapping[str, int]) -> dict[str, int]:
    after = Counter(node.op for node in program.nodes)
    made = {op: after[op] - before.get(op, 0) for op in sorted(FUSED)}
    return {op: count for op, count in made.items() if count > 0}


def _read_less(
    program: Program,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    is_free: bool,
    skip: Collection[str],
    remark: Remark,
) -> Program:
    """The rewritings of all engines that compute only what is read.

    Those of convolutions have no place here: ours keep the root of two that the file has, and
    the pixels of a transposed convolution where the layout has them.
    """
    two = {name: (2, *shape[1:]) for name, shape in shapes.items()}
    # two rows keep an axis of tokens apart from one of tokens and rows
    program = _rewrite(program, "rows", two if is_free else shapes, skip, remark)
    return _rewrite(program, "length", shapes, skip, remark)


def _rewrite(
    program: Program,
    name: str,
    shapes: Mapping[str, tuple[int, ...]],
    skip: Collection[str],
    remark: Remark,
) -> Program:
    def infer(program: Program) -> Shapes:
        values = infer_shapes(program, shapes)
        return {name: tuple(value.shape) for name, value in values.items()}

    return rewrite(program, {name} - set(skip), infer, remark)[0]


def _takes_rows(program: Program) -> bool:
    """Whether the first axis of every input and output is free."""
    specs = (*program.inputs, *program.outputs)
    return all(spec.shape and spec.shape[0] is None for spec in specs)
