"""MLX: Immich's own ONNX files on the Apple GPU (and, for tests, on a Linux CPU).

One thread owns MLX for the life of the process: it loads, traces, runs, converts and frees. No
array of MLX ever leaves it. The process must not fork once MLX has been used.
"""

import logging
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx

from immich_ml_metal.backends.base import AnyModel
from immich_ml_metal.backends.build import build_model
from immich_ml_metal.backends.device import Device
from immich_ml_metal.errors import LoadFailed
from immich_ml_metal.onnx_graph.rewriting import REWRITINGS, chosen_rewritings
from immich_ml_metal.onnx_mlx.compiled import MlxGraph, Options
from immich_ml_metal.onnx_mlx.formats import NumberFormat
from immich_ml_metal.settings import Settings
from immich_ml_metal.types import ModelFiles, ModelKey

log = logging.getLogger(__name__)

# Most pictures, texts or lines in one run. Rows of a batch wait for each other, so it stays small;
# not measured on a Mac yet.
_MAX_BATCH = 8
# Freed memory that MLX keeps for the next run. Not measured on a Mac yet.
_CACHE_BYTES = 512 * 2**20


@dataclass(frozen=True, slots=True)
class MlxMemory:
    """MLX's own account, in bytes. A limit of the cache bounds what is kept for reuse."""

    active_bytes: int
    cache_bytes: int
    peak_bytes: int
    cache_limit_bytes: int


class MlxEngine:
    """Runs Immich's files on MLX."""

    name = "mlx"
    needs_files = True
    number_formats = frozenset(str(each) for each in NumberFormat)

    def __init__(self, settings: Settings, *, prepared: bool = True) -> None:
        """Take the process's MLX; `prepared` keeps converted weights beside each model."""
        self._settings = settings
        self._prepared = prepared
        self.on_gpu = mx.default_device().type == mx.DeviceType.gpu
        self.number_format = choose_format(settings.mlx_dtype, on_gpu=self.on_gpu)
        mx.set_cache_limit(_CACHE_BYTES)
        # MLX aborts the process at exit if a thread ends with its streams open
        self.device = Device("mlx", on_exit=mx.clear_streams)

    def load(
        self, key: ModelKey, files: ModelFiles | None, number_format: str | None = None
    ) -> AnyModel:
        """Compile the graph and bind it to its task. Device thread only.

        `number_format` is one of `number_formats`; that of the settings when None.
        """
        assert files is not None, "the mlx engine needs files"
        chosen = self.number_format if number_format is None else NumberFormat(number_format)
        options = Options(
            number_format=chosen,
            max_batch=_MAX_BATCH,
            prepared=self._prepared,
            skip=frozenset(REWRITINGS) - set(chosen_rewritings(self._settings.graph_rewriting)),
        )
        graph = MlxGraph(files.graph, options)
        memory = self.memory()
        log.info(
            "model compiled: model=%s dtype=%s max_batch=%d active_mb=%d cache_mb=%d",
            key,
            chosen,
            graph.max_batch,
            memory.active_bytes >> 20,
            memory.cache_bytes >> 20,
        )
        try:
            return build_model(key, files, graph, self._settings)
        except LoadFailed:  # a side file is missing: nobody else holds the graph
            graph.close()
            raise

    def describe(self) -> dict[str, Any]:
        """What `/health` shows of this engine: number format, device and memory. Any thread."""
        return {
            "dtype": self.number_format,
            "on_gpu": self.on_gpu,
            "max_batch": _MAX_BATCH,
            "memory": asdict(self.memory()),
        }

    def memory(self) -> MlxMemory:
        """What MLX holds now. Any thread."""
        return MlxMemory(
            mx.get_active_memory(),
            mx.get_cache_memory(),
            mx.get_peak_memory(),
            _CACHE_BYTES,
        )


def choose_format(wanted: str, *, on_gpu: bool) -> NumberFormat:
    """The number format: as set, or float16 on a GPU and float32 on a CPU.

    float16 halves memory and doubles speed on a GPU at a cosine above 0.99999; a CPU has no kernels
    for it and is slower. bfloat16 loses three more bits for a range that these models do not need;
    what needs more range gets it from `mixed`.
    """
    if wanted != "auto":
        return NumberFormat(wanted)
    return NumberFormat.FLOAT16 if on_gpu else NumberFormat.FLOAT32
