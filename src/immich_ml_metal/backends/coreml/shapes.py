"""Fixed shapes for Core ML: which ones a batch is cut into, and a graph pinned to one. Pure.

Core ML compiles a graph per shape and runs free dimensions badly or not at all, so a graph is
pinned in memory, never on disk, and batches are cut into the few sizes that are compiled.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import onnx

from immich_ml_metal.errors import LoadFailed

BATCHES = (1, 4)  # Immich's own: one face is the common case, four the cap of a group picture
Shapes = tuple[tuple[str, tuple[int, ...]], ...]  # input name → full shape, in the graph's order


def cut(rows: int, sizes: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Cut `rows` into runs of the given sizes: yield (start, stop, size), size ≥ stop - start.

    Runs of the largest size first; the remainder is padded to the smallest size that holds it.
    """
    largest, start = max(sizes), 0
    while start < rows:
        left = min(rows - start, largest)
        yield start, start + left, min(size for size in sizes if size >= left)
        start += left


def label(shapes: Shapes) -> str:
    """Name shapes for a folder: `4x3x112x112`."""
    return "_".join("x".join(map(str, shape)) for _, shape in shapes)


def read_pinned(path: Path, shapes: Shapes) -> onnx.ModelProto:
    """Read an ONNX file with its external data and pin its inputs to `shapes`.

    Raises:
        LoadFailed: the file cannot be read.
    """
    try:
        model = onnx.load(path)
        pin_inputs(model, dict(shapes))
    except Exception as exc:  # protobuf's errors derive from Exception directly
        raise LoadFailed(f"{path} cannot be pinned to {label(shapes)}: {exc}") from exc
    return model


def pin_inputs(model: onnx.ModelProto, shapes: Mapping[str, Sequence[int]]) -> None:
    """Set the inputs' shapes; every shape that followed from the old ones is forgotten."""
    for value in model.graph.input:
        if value.name in shapes:
            _set_shape(value, shapes[value.name])
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    del model.graph.value_info[:]


def _set_shape(value: onnx.ValueInfoProto, shape: Sequence[int]) -> None:
    dims = value.type.tensor_type.shape.dim
    if len(dims) != len(shape):
        raise ValueError(f"input {value.name} has {len(dims)} dimensions, not {len(shape)}")
    for dim, side in zip(dims, shape, strict=True):
        dim.Clear()
        dim.dim_value = side
