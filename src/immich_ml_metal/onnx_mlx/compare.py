"""Run a model on MLX and on ONNX Runtime with the same random input, and say where they differ."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
import onnx
import onnxruntime as ort

from immich_ml_metal.onnx_graph.gap import gap
from immich_ml_metal.onnx_graph.graph import Program
from immich_ml_metal.onnx_graph.reader import read
from immich_ml_metal.onnx_graph.rewriting import REWRITINGS
from immich_ml_metal.onnx_mlx.executor import Executor, place
from immich_ml_metal.onnx_mlx.formats import NumberFormat
from immich_ml_metal.onnx_mlx.lower import lower
from immich_ml_metal.onnx_mlx.ops.call import to_device
from immich_ml_metal.onnx_mlx.passes.layout import MARK
from immich_ml_metal.types import Tensor, TensorSpec

Shape = tuple[int, ...]
TOKENS = 100  # random token ids stay below this: inside every vocabulary
ORT_ERRORS_ONLY = 3


@dataclass(frozen=True, slots=True)
class Difference:
    """How one value of ours differs from ONNX Runtime's.

    Attributes:
        largest: largest absolute difference.
        relative: the same, divided by the largest magnitude in ONNX Runtime's value.
        cosine: of the two values as vectors; 1 when both are zero.
    """

    name: str
    operator: str
    largest: float
    relative: float
    cosine: float


def guess_shapes(program: Program, given: Mapping[str, Shape] | None = None) -> dict[str, Shape]:
    """A plausible shape for each input: 1 row, and 64 for every other free length."""
    return {spec.name: (given or {}).get(spec.name) or _guess(spec) for spec in program.inputs}


def _guess(spec: TensorSpec) -> Shape:
    # 64 suits networks that halve a picture up to six times
    return tuple(length or (1 if axis == 0 else 64) for axis, length in enumerate(spec.shape))


def random_feeds(program: Program, shapes: Mapping[str, Shape], seed: int = 0) -> dict[str, Tensor]:
    """Normal floats, bytes over their whole range, small token ids."""
    rng = np.random.default_rng(seed)
    feeds: dict[str, Tensor] = {}
    for spec in program.inputs:
        shape = shapes[spec.name]
        if spec.dtype.kind == "f":
            feeds[spec.name] = rng.standard_normal(shape).astype(spec.dtype)
        else:
            high = 256 if spec.dtype == np.uint8 else TOKENS
            feeds[spec.name] = rng.integers(0, high, shape).astype(spec.dtype)
    return feeds


def difference(name: str, operator: str, ours: Tensor, theirs: Tensor) -> Difference:
    """Measure two arrays of the same shape against each other."""
    found = gap(ours, theirs)
    return Difference(name, operator, found.largest, found.relative, found.cosine)


def compare_outputs(
    path: Path, number_format: NumberFormat, shapes: Mapping[str, Shape] | None = None
) -> list[Difference]:
    """One difference for each output of the model."""
    program = read(path)
    feeds = random_feeds(program, guess_shapes(program, shapes))
    lowered = lower(program, mixed=number_format is NumberFormat.MIXED).program
    dtype = number_format.dtype
    executor = Executor(lowered, place(lowered, dtype), dtype)
    ours = executor({name: to_device(value, dtype) for name, value in feeds.items()})
    theirs = _run(_session(path.read_bytes(), path), feeds)
    return [
        difference(spec.name, "", _to_numpy(a), b)
        for spec, a, b in zip(program.outputs, ours, theirs, strict=True)
    ]


def compare_nodes(
    path: Path, number_format: NumberFormat, shapes: Mapping[str, Shape] | None = None
) -> Iterator[Difference]:
    """One difference for each value that both have, in the order in which it is computed.

    ONNX Runtime is told to compute every value of the file; the values that our fusions swallow are
    left out. The first large difference is the first diverging operation.
    """
    program = read(path)
    feeds = random_feeds(program, guess_shapes(program, shapes))
    theirs = _every_value(path, feeds)
    mixed = number_format is NumberFormat.MIXED
    lowered = lower(program, skip={"batch", *REWRITINGS}, mixed=mixed).program
    dtype = number_format.dtype
    executor = Executor(lowered, place(lowered, dtype), dtype)
    given = {name: to_device(value, dtype) for name, value in feeds.items()}
    for node, outputs in executor.trace(given):
        for name, value in outputs.items():
            plain = name.removesuffix(MARK)
            if plain not in theirs or node.attributes.get("layout"):
                continue
            ours = _to_numpy(value) if isinstance(value, mx.array) else value
            if plain != name:
                ours = ours.transpose(0, 3, 1, 2)
            if ours.shape == theirs[plain].shape:
                yield difference(plain, node.op, ours, theirs[plain])


def _to_numpy(value: mx.array) -> Tensor:
    floating = mx.issubdtype(value.dtype, mx.floating)
    return np.asarray(value.astype(mx.float32) if floating else value)


def _every_value(path: Path, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
    model = onnx.load(path, load_external_data=False)
    known = {value.name for value in model.graph.output}
    names = [name for node in model.graph.node for name in node.output if name]
    extra = [name for name in names if name not in known]
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in extra)
    session = _session(model.SerializeToString(), path, optimise=False)
    outputs = (output.name for output in session.get_outputs())
    return dict(zip(outputs, _run(session, feeds), strict=True))


def _run(session: ort.InferenceSession, feeds: Mapping[str, Tensor]) -> list[Tensor]:
    return [np.asarray(value) for value in session.run(None, dict(feeds))]


def _session(model: bytes, path: Path, *, optimise: bool = True) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = ORT_ERRORS_ONLY
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    folder = "session.model_external_initializers_file_folder_path"
    options.add_session_config_entry(folder, str(path.parent))
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
