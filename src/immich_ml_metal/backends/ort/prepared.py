"""Models prepared once for ONNX Runtime's CPU kernels, their weights mapped from disk ever after.

ONNX Runtime packs matrix weights for its kernels at every load and keeps both forms. Prepared, they
are a file beside the model that is mapped: a load takes a fifth of the time, memory falls by a
third and can be given back under pressure. Before that, the graph is rewritten so that it computes
only what is read (`rewritten`). The file depends on the weights, the runtime's version, the
rewritings and the processor.

Preparing runs in a process of its own, so that its peak of memory ends with it.
"""

import contextlib
import hashlib
import logging
import platform
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

import onnxruntime as ort

from immich_ml_metal.backends.ort.session import disabled_optimizers
from immich_ml_metal.onnx_files.derived import DerivedForm
from immich_ml_metal.onnx_files.references import weight_bytes
from immich_ml_metal.onnx_graph.rewriting import rewritings_digest

log = logging.getLogger(__name__)

FOLDER = "cpu"
_MAKER = "immich_ml_metal.backends.ort.preparing"  # by name: only the child needs `onnx`
GRAPH, WEIGHTS = "model.onnx", "model.data"
# Smaller ones load in a moment as they are. The smallest of Immich's models has 0.9 MB.
MIN_BYTES = 512 * 2**10
_ROOM = 4  # times the weights that must be free: two steps on the way, the form, room beside it
_TIMEOUT_S = 600.0
PACKING = {
    "session.save_external_prepacked_constant_initializers": "1",
    "session.optimized_model_external_initializers_file_name": WEIGHTS,
    "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
}


def worth_preparing(path: Path) -> bool:
    """Whether a model is large enough for its prepared form to pay."""
    return weight_bytes(path) >= MIN_BYTES


def prepared_form(path: Path, rewritings: Collection[str]) -> DerivedForm:
    """The prepared form of an ONNX file for this runtime on this processor, made or not.

    The processor is the variant: another machine may work on the same folder.
    """
    names = sorted(rewritings)
    made = (PACKING, disabled_optimizers(), names, rewritings_digest() if names else "")
    version = f"ort{ort.__version__}-{_short_digest(repr(made))}"
    return DerivedForm(path, FOLDER, version=version, variant=_processor())


def prepare_in_child(form: DerivedForm, rewritings: Collection[str]) -> Path:
    """Make the form in a process of its own; gives its folder.

    Raises:
        OSError: the disk is full or may not be written to.
        SubprocessError: ONNX Runtime failed or took too long; its last words are in `stderr`.
    """
    words: list[str] = []

    def write(folder: Path) -> None:
        command = [sys.executable, "-m", _MAKER, str(form.model), str(folder), *rewritings]
        done = subprocess.run(
            command, check=True, timeout=_TIMEOUT_S, capture_output=True, text=True
        )
        words.extend(done.stdout.split())

    folder = form.make(write, room_bytes=_ROOM * weight_bytes(form.model))
    log.info("model prepared model=%s folder=%s rewritten=%s", form.model, folder, words)
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
