"""One ONNX file in one ONNX Runtime session: how it is set up, what it tells, how it runs."""

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from immich_ml_metal.errors import InferenceError, LoadFailed, what_ran_out
from immich_ml_metal.onnx_files.references import weight_bytes
from immich_ml_metal.types import Tensor, TensorSpec

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
    whatever the service does beside it. Denormals count as zero, as in the official service (a
    processor takes many times as long for them): on the runtime's own threads, and on the thread
    that opens the process's first session.
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
    """What the official service switches off (contract §7); goes when it does so no longer."""
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
            OutOfMemory, Busy: it got no memory, or could open no file.
        """
        self.session = session = _open(path, options, providers)
        self.inputs = tuple(_spec(value) for value in session.get_inputs())
        self.outputs = tuple(_spec(value) for value in session.get_outputs())
        self.metadata: Mapping[str, str] = dict(session.get_modelmeta().custom_metadata_map)
        self.size_bytes = weight_bytes(weights or path)

    def run(self, feeds: Mapping[str, Tensor]) -> list[Tensor]:
        """Compute every output."""
        try:
            outputs: Any = self.session.run(None, dict(feeds))  # arrays: no graph gives sequences
            return list(outputs)
        except Exception as exc:  # as above
            raise what_ran_out(exc) or InferenceError(f"ONNX Runtime: {exc}") from exc

    def close(self) -> None:
        """Free the session."""
        del self.session


def _open(
    path: Path,
    options: ort.SessionOptions,
    providers: Sequence[str | tuple[str, dict[str, str]]],
) -> ort.InferenceSession:
    try:
        return ort.InferenceSession(
            path, options, providers=list(providers), disabled_optimizers=disabled_optimizers()
        )
    except Exception as exc:  # its exceptions derive from Exception directly
        raise what_ran_out(exc) or LoadFailed(f"ONNX Runtime rejects {path}: {exc}") from exc


def _spec(value: Any) -> TensorSpec:
    shape = tuple(side if isinstance(side, int) else None for side in value.shape)
    return TensorSpec(value.name, np.dtype(_DTYPES.get(value.type, np.float32)), shape)
