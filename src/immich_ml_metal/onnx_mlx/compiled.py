"""A model on MLX as the service sees it: NumPy in and out, one compiled function per shape.

Lives on one thread: load, run and close must be called on the thread that owns MLX.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import numpy as np

from immich_ml_metal.errors import InferenceError, LoadFailed
from immich_ml_metal.onnx_graph.graph import Program, replace_body
from immich_ml_metal.onnx_graph.reader import read
from immich_ml_metal.onnx_mlx.executor import (
    Executor,
    device_constants,
    infer_shapes,
    place_in,
)
from immich_ml_metal.onnx_mlx.formats import NumberFormat
from immich_ml_metal.onnx_mlx.lower import Lowered, lower
from immich_ml_metal.onnx_mlx.ops.call import Value, is_floating, to_device
from immich_ml_metal.onnx_mlx.prepared import Prepared
from immich_ml_metal.types import Tensor

GUESSED_PX = 64  # free lengths in the check at load: networks halve a picture up to six times
SHAPES = 32  # compiled functions kept: text recognition has 6 widths times 4 batches

Function = Callable[..., list[mx.array]]


@dataclass(frozen=True, slots=True)
class Options:
    """How a model is compiled.

    Attributes:
        number_format: which numbers it computes with.
        max_batch: the most rows of one run, for models whose rows are independent.
        compiled: whether to fuse kernels with `mx.compile`.
        prepared: whether to keep the converted weights on disk.
        skip: passes and rewritings to leave out.
    """

    number_format: NumberFormat = NumberFormat.FLOAT32
    max_batch: int = 1
    compiled: bool = True
    prepared: bool = False
    skip: frozenset[str] = frozenset()


class MlxGraph:
    """An ONNX file compiled onto MLX."""

    fixed_shapes = True

    def __init__(self, path: Path, options: Options) -> None:
        """Read, lower and place the model.

        Raises:
            LoadFailed: the file is damaged, or has an operator that MLX cannot run.
        """
        self._name = path.name
        self._options = options
        self._dtype = options.number_format.dtype
        lowered, constants = _load(path, options)
        program = lowered.program
        self.inputs, self.outputs = program.inputs, program.outputs
        self.metadata: Mapping[str, str] = program.metadata
        self.max_batch = options.max_batch if lowered.batched else 1
        self.size_bytes = sum(v.nbytes for v in constants.values() if isinstance(v, mx.array))
        self._pads_rows = lowered.batched
        self._executor: Executor | None = Executor(program, constants, self._dtype)
        self._functions: OrderedDict[tuple[object, ...], Function] = OrderedDict()

    def run(self, feeds: Mapping[str, Tensor]) -> list[Tensor]:
        """Compute every output; rows are padded to a power of two so that shapes repeat."""
        arrays = [_accept(spec.name, feeds) for spec in self.inputs]
        rows = len(arrays[0])
        if self._pads_rows:
            arrays = [_pad_rows(array, self._bucket(rows)) for array in arrays]
        function = self._function(tuple((a.shape, a.dtype.str) for a in arrays))
        results = function(*(to_device(array, self._dtype) for array in arrays))
        mx.eval(results)
        taken = [np.array(result) for result in results]
        if self._pads_rows:
            taken = [result[:rows] for result in taken]
        pairs = zip(taken, self.outputs, strict=True)
        return [t if t.dtype.kind == "f" else t.astype(spec.dtype) for t, spec in pairs]

    def close(self) -> None:
        """Free the weights and what MLX kept for reuse."""
        self._functions.clear()
        self._executor = None
        mx.clear_cache()

    @property
    def shapes(self) -> int:
        """How many input shapes are compiled now."""
        return len(self._functions)

    def _bucket(self, rows: int) -> int:
        size = 1
        while size < rows:
            size *= 2
        return max(rows, min(size, self.max_batch))

    def _function(self, key: tuple[object, ...]) -> Function:
        if key in self._functions:
            self._functions.move_to_end(key)
            return self._functions[key]
        function = mx.compile(self._trace) if self._options.compiled else self._trace
        self._functions[key] = function
        if len(self._functions) > SHAPES:
            self._functions.popitem(last=False)
        return function

    def _trace(self, *arrays: mx.array) -> list[mx.array]:
        if self._executor is None:
            raise InferenceError(f"{self._name} is closed")
        names = (spec.name for spec in self.inputs)
        results = self._executor(dict(zip(names, arrays, strict=True)))
        return [r.astype(mx.float32) if is_floating(r) else r for r in results]


def _load(path: Path, options: Options) -> tuple[Lowered, Mapping[str, Value]]:
    """The lowered program and its constants, from the prepared file where there is a good one."""
    prepared = Prepared(path, options.number_format, options.skip) if options.prepared else None
    found = prepared.load() if prepared else None
    if found is not None:
        return found
    mixed = options.number_format is NumberFormat.MIXED
    lowered = lower(read(path), skip=options.skip, mixed=mixed)
    check_forms(lowered.program)
    constants: dict[str, Value] = dict(lowered.program.constants)
    on_device = device_constants(lowered.program)
    body = replace_body(lowered.program, lowered.program.nodes, {})
    lowered = replace(lowered, program=body)  # the only holder of a weight is now `constants`
    place_in(constants, on_device, options.number_format.dtype)
    if prepared is not None:
        prepared.save(lowered, constants)
    return lowered, constants


def check_forms(program: Program) -> None:
    """Trace the program without computing it, to find forms of operators that have no translation.

    Raises:
        LoadFailed: names the node.
    """
    free = any(length is None for spec in program.inputs for length in spec.shape)
    shapes = {
        spec.name: tuple(n or (1 if axis == 0 else GUESSED_PX) for axis, n in enumerate(spec.shape))
        for spec in program.inputs
    }
    try:
        infer_shapes(program, shapes)
    except (ValueError, TypeError, IndexError, RuntimeError) as exc:
        if not free:  # a guessed length may well be one that the network does not take
            raise LoadFailed(f"{program.name}: the mlx engine cannot run it: {exc}") from exc


def _accept(name: str, feeds: Mapping[str, Tensor]) -> Tensor:
    if name not in feeds:
        raise InferenceError(f"input {name!r} is missing, given are {sorted(feeds)}")
    return np.ascontiguousarray(feeds[name])


def _pad_rows(array: Tensor, rows: int) -> Tensor:
    missing = rows - len(array)
    return array if not missing else np.concatenate([array, np.repeat(array[-1:], missing, 0)])
