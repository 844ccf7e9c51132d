"""The rewritings that hold for every engine, by name and in their order.

Each takes a program and gives one that computes the same with less work, or the very program where
its pattern is not found; it tells `note` why. Engines that have a form of their own apply them
before they make it.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from types import MappingProxyType

from immich_ml_metal.onnx_files.derived import source_digest
from immich_ml_metal.onnx_graph.axes import Shapes
from immich_ml_metal.onnx_graph.free_length import free_length
from immich_ml_metal.onnx_graph.gelu import fuse_gelu
from immich_ml_metal.onnx_graph.graph import Node, Program
from immich_ml_metal.onnx_graph.match import Note
from immich_ml_metal.onnx_graph.read_rows import read_rows
from immich_ml_metal.onnx_graph.upscaling import upscale_by_products

Rewriting = Callable[[Program, Shapes, Note], Program]
Remark = Callable[[str, Node, str], None]  # rewriting, node, why it was left alone

REWRITINGS: Mapping[str, Rewriting] = MappingProxyType(
    {
        "rows": read_rows,
        "length": free_length,
        "gelu": fuse_gelu,
        "upscaling": upscale_by_products,
    }
)


def chosen_rewritings(setting: Sequence[str]) -> tuple[str, ...]:
    """The names that the setting chooses: `all`, `off`, or some of them."""
    return tuple(name for name in REWRITINGS if "all" in setting or name in setting)


def rewrite(
    program: Program,
    chosen: Collection[str],
    infer_shapes: Callable[[Program], Shapes],
    remark: Remark,
) -> tuple[Program, tuple[str, ...]]:
    """Apply the rewritings whose names are chosen; gives the names of those that changed it."""
    applied = []
    for name, run in REWRITINGS.items():
        if name in chosen:
            rewritten = run(program, infer_shapes(program), partial(remark, name))
            if rewritten is not program:
                applied.append(name)
            program = rewritten
    return program, tuple(applied)


@cache
def rewritings_digest() -> str:
    """Digest of their source, for the version of forms that they went into."""
    return source_digest(Path(__file__).parent)
