"""Large weights, prepared once for ONNX Runtime's CPU kernels and mapped from disk ever after.

ONNX Runtime packs matrix weights for its kernels at every load and keeps both forms. Prepared, they
are a file beside the model that is mapped: a load takes a fifth of the time, memory falls by a
third and can be given back under pressure. The file depends on the weights, the runtime's version
and the processor.

Preparing runs in a process of its own, so that its peak of memory ends with it.
"""

import contextlib
import hashlib
import logging
import os
import platform
import subprocess
import sys
from pathlib import Path

import onnxruntime as ort

from immich_ml_metal.backends.ort.session import disabled_optimizers, session_options
from immich_ml_metal.onnx_files.derived import DerivedForm
from immich_ml_metal.onnx_files.references import weight_bytes

log = logging.getLogger(__name__)

FOLDER = "cpu"
GRAPH, WEIGHTS = "model.onnx", "model.data"
MIN_BYTES = 32 * 2**20  # smaller models load in a moment as they are
_ROOM = 3  # times the weights that must be free: what is written, and room to work beside it
_TIMEOUT_S = 600.0
_OPTIONS = {
    "session.save_external_prepacked_constant_initializers": "1",
    "session.optimized_model_external_initializers_file_name": WEIGHTS,
    "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
}


def worth_preparing(path: Path) -> bool:
    """Whether a model is large enough for its prepared form to pay."""
    return weight_bytes(path) >= MIN_BYTES


def prepared_form(path: Path) -> DerivedForm:
    """The prepared form of an ONNX file for this runtime on this processor, made or not.

    The processor is the variant: another machine may work on the same folder.
    """
    options = _short_digest(repr((_OPTIONS, disabled_optimizers())))
    version = f"ort{ort.__version__}-{options}"
    return DerivedForm(path, FOLDER, version=version, variant=_processor())


def prepare_in_child(form: DerivedForm) -> Path:
    """Make the form in a process of its own; gives its folder.

    Raises:
        OSError: the disk is full or may not be written to.
        SubprocessError: ONNX Runtime failed or took too long; its last words are in `stderr`.
    """

    def write(folder: Path) -> None:
        command = [sys.executable, "-m", __name__, str(form.model), str(folder)]
        subprocess.run(command, check=True, timeout=_TIMEOUT_S, capture_output=True)

    folder = form.make(write, room_bytes=_ROOM * weight_bytes(form.model))
    log.info("weights prepared model=%s folder=%s", form.model, folder)
    return folder


def _processor() -> str:
    """What this processor can do, as eight hexadecimal digits."""
    cpu = platform.machine() + platform.processor()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu += next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return _short_digest(cpu)


def _short_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def write_prepared(path: Path, folder: Path) -> None:
    """Open `path` once so that ONNX Runtime leaves its optimised, packed form in `folder`."""
    options = session_options(threads=os.cpu_count() or 1)
    for key, value in _OPTIONS.items():
        options.add_session_config_entry(key, value)
    options.optimized_model_filepath = str(folder / GRAPH)
    ort.InferenceSession(
        path,
        options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=disabled_optimizers(),
    )


if __name__ == "__main__":
    write_prepared(Path(sys.argv[1]), Path(sys.argv[2]))
