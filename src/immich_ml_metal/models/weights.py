"""What tells a model's weights apart: by size and time in a moment, by content for good."""

import hashlib
from pathlib import Path

_SIDE_FILES = {".json", ".txt", ".lock"}  # not weights
_DIGEST_LETTERS = 16  # 64 bits: nobody attacks this, it only has to tell exports apart

Stamp = dict[str, list[int]]  # file name → size in bytes and time of change in nanoseconds


def weight_files(graph: Path) -> list[Path]:
    """The ONNX file and the external data that may lie beside it."""
    return sorted(
        file for file in graph.parent.iterdir() if file.is_file() and file.suffix not in _SIDE_FILES
    )


def stamp_of(graph: Path) -> Stamp:
    """What tells a replaced file without reading it."""
    return {
        file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in weight_files(graph)
    }


def digest_of(graph: Path) -> str:
    """First 16 hex digits of the SHA-256 of an ONNX file and its external data."""
    total = hashlib.sha256()
    for file in weight_files(graph):
        with file.open("rb") as stream:
            total.update(hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()[:_DIGEST_LETTERS]
