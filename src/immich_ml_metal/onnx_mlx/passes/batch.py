"""From a graph that takes one row to one that takes any number, with the same kernels.

Immich's legacy exports have a batch of 1 written into their shapes. The invariant kept here: every
value of the rewritten graph is, along one known axis, the concatenation of what the original graph
gives for each row (or their interleaving, where an exporter merged the rows into the end of another
axis). An operator is accepted only with a rule under which that remains true, so rows cannot touch
each other. Whatever rearranges elements without changing their order becomes a Reshape
with -1 at that axis; positions counted from the start of a row are shifted to their row; constants
that must line up with the rows are repeated.
"""

from immich_ml_metal.onnx_graph.graph import Program
from immich_ml_metal.onnx_graph.match import Note, ignore
from immich_ml_metal.onnx_mlx.fold import static_shapes
from immich_ml_metal.onnx_mlx.passes.row_rules import RULES
from immich_ml_metal.onnx_mlx.passes.rows import Rows, RowsMix


def free_batch(program: Program, note: Note = ignore) -> tuple[Program, str]:
    """Let a program with a fixed batch of 1 take any number of rows.

    Returns:
        The program, and why it is unchanged; an empty reason means that it was rewritten.
    """
    shapes = static_shapes(program)
    if shapes is None:
        return program, "its input shapes are free already"
    if any(not shape or shape[0] != 1 for shape in shapes.values()):
        return program, "its inputs do not start with a batch of 1"
    try:
        return Rows(program, shapes).rewrite(RULES), ""
    except RowsMix as exc:
        note(exc.node, exc.reason)
        return program, str(exc)
