"""Constant folding: what does not depend on the input is computed once, at load."""

import mlx.core as mx

from immich_ml_metal.errors import LoadFailed
from immich_ml_metal.onnx_graph.graph import Node, Program, prune, replace_body
from immich_ml_metal.onnx_mlx.executor import infer_shapes
from immich_ml_metal.onnx_mlx.host import evaluate
from immich_ml_metal.types import Tensor

GROWTH_BYTES = 2**26  # a folded value this much larger than its inputs stays an operation


def fold_constants(program: Program) -> Program:
    """Evaluate the nodes whose inputs are all constants."""
    constants: dict[str, Tensor] = dict(program.constants)
    kept: list[Node] = []
    for node in program.nodes:
        if not all(name in constants for name in node.inputs if name):
            kept.append(node)
            continue
        arguments = [constants.get(name) for name in node.inputs]
        results = _evaluate(program, node, arguments)
        grown = sum(r.nbytes for r in results) - sum(a.nbytes for a in arguments if a is not None)
        if grown > GROWTH_BYTES:
            kept.append(node)
        else:
            constants.update(zip((n for n in node.outputs if n), results, strict=True))
    return prune(replace_body(program, tuple(kept), constants))


def _evaluate(program: Program, node: Node, arguments: list[Tensor | None]) -> list[Tensor]:
    try:
        return evaluate(node, arguments, program.opset)
    except Exception as exc:  # the reference implementation raises whatever NumPy raises
        raise LoadFailed(f"{program.name}: cannot evaluate {node}: {exc}") from exc


def static_shapes(program: Program) -> dict[str, tuple[int, ...]] | None:
    """The input shapes of a program that accepts only one, else None."""
    shapes = {}
    for spec in program.inputs:
        if any(length is None for length in spec.shape):
            return None
        shapes[spec.name] = tuple(length for length in spec.shape if length is not None)
    return shapes


def fold_shapes(program: Program) -> Program:
    """Where the input shapes are fixed, so is everything computed from shapes: make it constant."""
    shapes = static_shapes(program)
    if shapes is None:
        return program
    values = infer_shapes(program, shapes)
    known = {
        name: value
        for node in program.nodes
        for name in node.outputs
        if name and not isinstance(value := values[name], mx.array)
    }
    kept = tuple(n for n in program.nodes if not any(name in known for name in n.outputs))
    return prune(replace_body(program, kept, {**program.constants, **known}))
