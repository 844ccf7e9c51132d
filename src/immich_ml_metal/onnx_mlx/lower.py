"""From the file's program to the one that runs: fold, free the batch, fuse, lay out."""

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial

from immich_ml_metal.onnx_graph.graph import Node, Program
from immich_ml_metal.onnx_mlx.executor import require_operators
from immich_ml_metal.onnx_mlx.fold import fold_constants, fold_shapes
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
    """Run every pass but those in `skip` (names of `PASSES`, and `batch`).

    `mixed` gives the operands of products 16 bits; `remark` is told of each node that a pass
    looked at and left alone, and why.

    Raises:
        LoadFailed: an operator has no translation.
    """
    require_operators(program)
    program = fold_constants(fold_shapes(fold_constants(program)))
    reason = "not asked for"
    if "batch" not in skip:
        program, reason = free_batch(program, partial(remark, "batch"))
    before = Counter(node.op for node in program.nodes)
    for name, run in PASSES.items():
        if name not in skip:
            program = run(program, partial(remark, name))
    if mixed:
        program = mix(program)
    after = Counter(node.op for node in program.nodes)
    fused = {op: after[op] - before[op] for op in sorted(FUSED) if after[op] > before[op]}
    return Lowered(program, _takes_rows(program), reason, fused)


def _takes_rows(program: Program) -> bool:
    """Whether the first axis of every input and output is free."""
    specs = (*program.inputs, *program.outputs)
    return all(spec.shape and spec.shape[0] is None for spec in specs)
