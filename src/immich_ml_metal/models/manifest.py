"""What is known about the files of one model: origin, size, digest, when last found intact.

Kept beside the model as `.immich-ml-metal.json`; without it the files count as placed by hand.
"""

import functools
import hashlib
import json
import logging
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from immich_ml_metal.errors import what_ran_out
from immich_ml_metal.system.owner import write_whole

log = logging.getLogger(__name__)

NAME, VERSION = ".immich-ml-metal.json", 1
_CHUNK = 2**20


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One file as it was when last verified.

    Attributes:
        source: the repository or address it came from.
        revision: the hub's commit, or the release on ModelScope.
        fetched_at: unix seconds.
        verified_at: unix seconds; when its digest last matched.
    """

    size_bytes: int
    sha256: str
    source: str
    revision: str
    fetched_at: float
    verified_at: float


@dataclass(frozen=True, slots=True)
class Manifest:
    """The records of one model's files, by path relative to the model's folder."""

    files: Mapping[str, FileRecord] = field(default_factory=dict)

    def with_files(self, records: Mapping[str, FileRecord]) -> "Manifest":
        """The same, with these records added or replaced."""
        return Manifest({**self.files, **records})

    def touched(self, paths: Mapping[str, float]) -> "Manifest":
        """The same, with new `verified_at` for these paths."""
        return Manifest(
            {
                path: replace(record, verified_at=paths.get(path, record.verified_at))
                for path, record in self.files.items()
            }
        )


def load_manifest(root: Path) -> Manifest:
    """Read the manifest of the model in `root`; an absent or unreadable one knows no files.

    One that a newer release wrote counts as unreadable, which is told once.
    """
    try:
        data = json.loads((root / NAME).read_text(encoding="utf-8"))
        if (version := int(data["version"])) > VERSION:
            _tell_newer(root / NAME, version)
            return Manifest()
        return Manifest({path: FileRecord(**row) for path, row in data["files"].items()})
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as exc:
        if what_ran_out(exc):
            raise
        return Manifest()  # its files then count as unverified, which is what we know


@functools.cache
def _tell_newer(path: Path, version: int) -> None:
    log.warning(
        "%s was written by a newer release (version %s, this one reads %d): it is left alone, and "
        "the files count as placed by hand",
        *(path, version, VERSION),
    )


def save_manifest(root: Path, manifest: Manifest) -> None:
    """Write the manifest, replacing the old one in one step; never a newer release's."""
    with suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
        if int(json.loads((root / NAME).read_bytes())["version"]) > VERSION:
            return
    data = {
        "version": VERSION,
        "files": {path: asdict(manifest.files[path]) for path in sorted(manifest.files)},
    }
    write_whole(root / NAME, json.dumps(data, indent=1).encode())


def describe_file(
    path: Path, source: str, revision: str, *, sha256: str | None = None
) -> FileRecord:
    """The record of a file that was just found intact; its digest is computed when not known."""
    found = path.stat()
    return FileRecord(
        size_bytes=found.st_size,
        sha256=sha256 or sha256_of(path),
        source=source,
        revision=revision,
        fetched_at=found.st_mtime,
        verified_at=time.time(),
    )


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def git_sha1_of(path: Path) -> str:
    """The id git, and so the hub, gives to a file's content."""
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
