"""What the compiler makes of a model: operators, fusions, parameters, work and shapes."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from immich_ml_metal.onnx_graph.graph import Node, Program
from immich_ml_metal.onnx_graph.reader import read
from immich_ml_metal.onnx_mlx.compare import Shape, guess_shapes
from immich_ml_metal.onnx_mlx.executor import infer_shapes
from immich_ml_metal.onnx_mlx.lower import Lowered, lower
from immich_ml_metal.onnx_mlx.ops import HOST_ONLY, OPERATORS
from immich_ml_metal.onnx_mlx.ops.call import Value
from immich_ml_metal.types import TensorSpec


@dataclass(frozen=True, slots=True)
class Explanation:
    """A model in numbers.

    Attributes:
        before: operators of the file, with how often each occurs.
        after: operators that run.
        unsupported: operators without a translation; the model is not lowered if there are any.
        layout_transposes: turns between channels-first and channels-last that the layout needs.
        parameters: elements of all floating constants.
        flops: multiplications and additions of one run at `shapes`.
        left_alone: nodes that a pass looked at and left as they are, and why.
    """

    program: Program
    before: Mapping[str, int]
    unsupported: tuple[str, ...]
    lowered: Lowered | None = None
    after: Mapping[str, int] | None = None
    layout_transposes: int = 0
    parameters: int = 0
    flops: int = 0
    shapes: Mapping[str, Shape] | None = None
    left_alone: tuple["LeftAlone", ...] = ()


@dataclass(frozen=True, slots=True)
class LeftAlone:
    """A node that a pass might have rewritten and did not."""

    rewriting: str
    node: Node
    reason: str


def explain(path: Path, shapes: Mapping[str, Shape] | None = None) -> Explanation:
    """Read and lower a model without running it."""
    program = read(path)
    before = Counter(node.op for node in program.nodes)
    known = HOST_ONLY | OPERATORS.keys()
    unsupported = tuple(sorted(op for op in before if op not in known))
    if unsupported:
        return Explanation(program, before, unsupported)
    left_alone: list[LeftAlone] = []
    lowered = lower(program, remark=lambda *found: left_alone.append(LeftAlone(*found)))
    chosen = guess_shapes(program, shapes)
    values = infer_shapes(lowered.program, chosen)
    nodes = lowered.program.nodes
    return Explanation(
        program,
        before,
        (),
        lowered,
        Counter(node.op for node in nodes),
        sum(bool(node.attributes.get("layout")) for node in nodes),
        sum(v.size for v in lowered.program.constants.values() if v.dtype.kind == "f"),
        sum(count_flops(node, values) for node in nodes),
        chosen,
        tuple(left_alone),
    )


def count_flops(node: Node, values: Mapping[str, Value]) -> int:
    """Multiplications and additions of a node; only the operators that matter are counted."""
    out = values.get(node.outputs[0], None)
    if not isinstance(out, mx.array):
        return 0
    if node.op in ("Conv", "ConvTranspose"):
        weight = values[node.inputs[1]]
        if node.op == "Conv":
            return 2 * out.size * math.prod(weight.shape[1:])
        picture = values[node.inputs[0]]
        return 2 * picture.size * math.prod(weight.shape[1:])
    if node.op in ("MatMul", "Linear", "Gemm"):
        x = values[node.inputs[0]]
        inner = x.shape[0 if node.attributes.get("transA") else -1]
        return 2 * out.size * inner
    if node.op in ("Sdpa", "Attention"):
        q, k = values[node.inputs[0]], values[node.inputs[1]]
        return 4 * q.size * (k.size // (k.shape[-1] * math.prod(k.shape[:-2])))
    return 0


def render(found: Explanation) -> str:
    """The explanation as text for a terminal."""
    lines = [f"{found.program.name}: opset {found.program.opset}"]
    lines += [f"  input   {_spec(spec)}" for spec in found.program.inputs]
    lines += [f"  output  {_spec(spec)}" for spec in found.program.outputs]
    lines.append(f"  file    {_counts(found.before)}")
    if found.lowered is None or found.after is None:
        return "\n".join([*lines, f"  NOT SUPPORTED: {', '.join(found.unsupported)}"])
    lowered = found.lowered
    batch = "free" if lowered.batched else f"1 ({lowered.reason or 'outputs have no row axis'})"
    lines += [
        "  covered every operator",
        f"  runs    {_counts(found.after)}",
        f"  fused   {_counts(lowered.fused)}",
        f"  layout  {found.layout_transposes} transpositions between NCHW and NHWC",
        f"  batch   {batch}",
        f"  weights {found.parameters / 1e6:.1f} M parameters",
        f"  work    {found.flops / 1e9:.2f} GFLOP at {dict(found.shapes or {})}",
    ]
    return "\n".join(lines)


def render_reasons(found: Explanation) -> str:
    """A line for each node that a pass looked at and left alone."""
    rows = [(one.rewriting, str(one.node), one.reason) for one in found.left_alone]
    widths = [max((len(row[column]) for row in rows), default=0) for column in (0, 1)]
    lines = [f"  {a:{widths[0]}}  {b:{widths[1]}}  {reason}" for a, b, reason in rows]
    return "\n".join(["why nodes were left alone", *(lines or ["  none was"])])


def _spec(spec: TensorSpec) -> str:
    return f"{spec.name}: {spec.dtype.name}{[n if n else '?' for n in spec.shape]}"


def _counts(counts: Mapping[str, int]) -> str:
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return f"{sum(counts.values())}: " + ", ".join(f"{op} {n}" for op, n in ordered)
