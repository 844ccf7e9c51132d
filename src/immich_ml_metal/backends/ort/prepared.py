"""Large weights, prepared once for ONNX Runtime's CPU kernels and mapped from disk ever after.

ONNX Runtime packs matrix weights for its kernels at every load and keeps both forms. Prepared, they
are a file beside the model that is mapped: a load takes a fifth of the time, memory falls by a
third and can be given back under pressure. The file depends on the weights, the runtime's version
and the processor, so its folder is named after the three; it is safe to delete.

Preparing runs in a process of its own, so that its peak of memory ends with it.
"""

import contextlib
import hashlib
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import onnxruntime as ort

from immich_ml_metal.models.weights import Stamp, stamp_of, weight_files

log = logging.getLogger(__name__)

FOLDER = "cpu"
MIN_BYTES = 32 * 2**20  # smaller models load in a moment as they are
_MANIFEST = "manifest.json"
_GRAPH, _WEIGHTS = "model.onnx", "model.data"
_STAGING = ".staging-"
_TIMEOUT_S = 600.0


def prepared_graph(path: Path) -> Path:
    """The prepared form of an ONNX file, made now if need be.

    Returns `path` itself where preparing does not pay or is not possible (small model, read-only or
    full disk): the numbers are the same, only load time and memory differ.
    """
    sources = weight_files(path)
    if sum(source.stat().st_size for source in sources) < MIN_BYTES:
        return path
    found = _find(path.parent / FOLDER, stamp=stamp_of(path))
    if found is not None:
        return found
    try:
        return _prepare(path, sources)
    except (OSError, subprocess.SubprocessError) as exc:
        reason = _reason(exc)
        log.warning("weights not prepared, loaded as they are model=%s reason=%s", path, reason)
        return path


def _reason(exc: Exception) -> str:
    """What went wrong, in the failed process's own last words where it had any."""
    words = getattr(exc, "stderr", None) or b""
    lines = words.decode(errors="replace").splitlines()
    return lines[-1] if lines else str(exc)


def _environment() -> str:
    """Runtime version and processor, as the end of a folder's name."""
    return f"ort{ort.__version__}-{_processor()}"


def _processor() -> str:
    """What this processor can do, as eight hexadecimal digits."""
    cpu = platform.machine() + platform.processor()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu += next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return hashlib.sha256(cpu.encode()).hexdigest()[:8]


def _find(folder: Path, *, stamp: Stamp) -> Path | None:
    """A complete prepared form of these very files for this very runtime."""
    for candidate in sorted(folder.glob(f"*-{_environment()}")):
        manifest = _read_manifest(candidate)
        if manifest is not None and manifest["sources"] == stamp:
            return candidate / _GRAPH
    return None


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a prepared form whose files are whole, else None."""
    try:
        manifest: dict[str, Any] = json.loads((folder / _MANIFEST).read_text())
        sizes = {name: (folder / name).stat().st_size for name in manifest["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return manifest if sizes == manifest["files"] else None


def _prepare(path: Path, sources: list[Path]) -> Path:
    folder = path.parent / FOLDER
    folder.mkdir(exist_ok=True)
    size_bytes = sum(source.stat().st_size for source in sources)
    if shutil.disk_usage(folder).free < 3 * size_bytes:
        raise OSError(f"less than {3 * size_bytes / 2**20:.0f} MiB free on {folder}")
    stamp, digest = stamp_of(path), _digest(sources)
    target = folder / f"{digest[:16]}-{_environment()}"
    _sweep(folder)
    staging = Path(tempfile.mkdtemp(prefix=_STAGING, dir=folder))
    try:
        command = [sys.executable, "-m", __name__, str(path), str(staging)]
        subprocess.run(command, check=True, timeout=_TIMEOUT_S, capture_output=True)
        files = {name: (staging / name).stat().st_size for name in (_GRAPH, _WEIGHTS)}
        manifest = {"sources": stamp, "sha256": digest, "files": files}
        (staging / _MANIFEST).write_text(json.dumps(manifest))
        # Forms of other weights or runtimes are stale; those of another processor belong to
        # another machine on the same folder.
        for old in folder.glob(f"[!.]*-{_processor()}"):
            shutil.rmtree(old, ignore_errors=True)
        staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    log.info("weights prepared model=%s folder=%s", path, target)
    return target / _GRAPH


def _sweep(folder: Path) -> None:
    """Remove what processes left that were killed while they prepared."""
    for left in folder.glob(f"{_STAGING}*"):
        if time.time() - left.stat().st_mtime > 2 * _TIMEOUT_S:
            shutil.rmtree(left, ignore_errors=True)


def _digest(sources: list[Path]) -> str:
    digest = hashlib.sha256()
    for source in sources:
        with source.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def write_prepared(path: Path, folder: Path) -> None:
    """Write `path`, optimised for this processor, with its packed weights to `folder`."""
    from immich_ml_metal.backends.ort.engine import disabled_optimizers, session_options

    options = session_options(threads=os.cpu_count() or 1)
    for key, value in {
        "session.save_external_prepacked_constant_initializers": "1",
        "session.optimized_model_external_initializers_file_name": _WEIGHTS,
        "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
    }.items():
        options.add_session_config_entry(key, value)
    options.optimized_model_filepath = str(folder / _GRAPH)
    ort.InferenceSession(
        path,
        options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=disabled_optimizers(),
    )


if __name__ == "__main__":
    write_prepared(Path(sys.argv[1]), Path(sys.argv[2]))
