"""ONNX Runtime: the portable engine, and the reference for the others.

Large weights are prepared once (`ort_prepared`) and mapped; sessions follow the load
(`ort_adaptive`).
"""

import logging
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from immich_ml_metal.backends.base import AnyModel
from immich_ml_metal.backends.build import build_model
from immich_ml_metal.backends.device import Device
from immich_ml_metal.backends.ort.adaptive import AdaptiveGraph, CoreLoad
from immich_ml_metal.backends.ort.prepared import prepared_graph
from immich_ml_metal.errors import InferenceError, LoadFailed
from immich_ml_metal.settings import Settings
from immich_ml_metal.threads import inference_cores
from immich_ml_metal.types import ModelFiles, ModelKey, Part, Tensor, TensorSpec

log = logging.getLogger(__name__)

_DTYPES: Mapping[str, Any] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(uint8)": np.uint8,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
    "tensor(bool)": np.bool_,
}


def session_options(threads: int) -> ort.SessionOptions:
    """How every session is set up.

    No arena: it keeps the peak for ever. No spinning: a thread that spins takes its core from
    whatever the service does beside it. Denormals count as zero, as in the official service: a
    processor takes many times as long for them.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = False
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    return options


def disabled_optimizers() -> list[str]:
    """Optimisations the official service switches off (contract §7.5)."""
    return ["ConvAddActivationFusion"] if platform.machine() in ("arm64", "aarch64") else []


class OrtGraph:
    """An ONNX file in an ONNX Runtime session. `run` may be called from several threads."""

    max_batch = 1  # one row at a time: rows side by side on several cores are as fast
    fixed_shapes = False

    def __init__(
        self,
        path: Path,
        *,
        options: ort.SessionOptions,
        providers: Sequence[str | tuple[str, dict[str, str]]] = ("CPUExecutionProvider",),
        weights: Path | None = None,
    ) -> None:
        """Open a file.

        Args:
            path: the ONNX file.
            options: how the session is set up.
            providers: where it may run, in order of preference.
            weights: the official file where `path` is its prepared form, which holds them twice.

        Raises:
            LoadFailed: ONNX Runtime rejects the file.
        """
        try:
            session = ort.InferenceSession(
                path, options, providers=list(providers), disabled_optimizers=disabled_optimizers()
            )
        except Exception as exc:  # its exceptions derive from Exception directly
            raise LoadFailed(f"ONNX Runtime rejects {path}: {exc}") from exc
        self.session = session
        self.inputs = tuple(_spec(value) for value in session.get_inputs())
        self.outputs = tuple(_spec(value) for value in session.get_outputs())
        self.metadata: Mapping[str, str] = dict(session.get_modelmeta().custom_metadata_map)
        source = weights or path
        files = (file for file in source.parent.glob(f"{source.stem}*") if file.is_file())
        self.size_bytes = sum(file.stat().st_size for file in files)

    def run(self, feeds: Mapping[str, Tensor]) -> list[Tensor]:
        """Compute every output."""
        try:
            outputs: Any = self.session.run(None, dict(feeds))  # arrays: no graph gives sequences
            return list(outputs)
        except Exception as exc:  # as above
            raise InferenceError(f"ONNX Runtime: {exc}") from exc

    def close(self) -> None:
        """Free the session."""
        del self.session


def _spec(value: Any) -> TensorSpec:
    shape = tuple(side if isinstance(side, int) else None for side in value.shape)
    return TensorSpec(value.name, np.dtype(_DTYPES.get(value.type, np.float32)), shape)


class OrtEngine:
    """Runs Immich's files on the CPU."""

    name = "cpu"
    needs_files = True

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._cores = settings.intra_op_threads or inference_cores()
        self._load = CoreLoad()
        self.device = Device("cpu", width=inference_cores())

    def load(self, key: ModelKey, files: ModelFiles | None) -> AnyModel:
        """Open the graph, from its prepared form where that pays, and bind it to its task."""
        assert files is not None, "the cpu engine needs files"
        path = prepared_graph(files.graph)

        def open_graph(threads: int) -> OrtGraph:
            options = session_options(threads)
            if path != files.graph:  # optimised when it was prepared
                options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
            return OrtGraph(path, options=options, weights=files.graph)

        # Faces and lines come several at a time, even from a lone request: one core each.
        cores = 1 if key.part is Part.RECOGNITION else self._cores
        graph = AdaptiveGraph(open_graph, self._load, cores=cores)
        return build_model(key, files, graph, self._settings)
