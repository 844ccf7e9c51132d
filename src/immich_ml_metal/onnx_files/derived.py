"""Forms derived from a model's weights, kept beside it: made once, found again, replaced if stale.

ONNX Runtime packs weights, MLX converts them, Core ML compiles them: each keeps what it made in
`<model folder>/<kind>/<model>-<weights>-<version>-<variant>/`. A form is used only when everything
that decided its content is the same: the weights (by size and time of change, by their digest when
these moved), the makers' versions (in its name) and the files it is made of (by size). It is made
in a folder of another name and renamed when whole, so a process that is killed leaves nothing that
would be taken for a form. Safe to delete.
"""

import contextlib
import glob
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from immich_ml_metal.onnx_files.references import weight_files
from immich_ml_metal.setting_kinds import format_bytes

log = logging.getLogger(__name__)

_MANIFEST = "manifest.json"
_DIGITS = 16  # of the weights' digest, in a form's name
_STAGING = ".staging-"
ABANDONED_S = 1200.0  # no form takes this long to make: its maker was killed
_FOLDER_MODE, _FILE_MODE = 0o755, 0o644  # readable by every user, like the model

Stamp = dict[str, list[int]]


@dataclass(frozen=True, slots=True)
class DerivedForm:
    """One kind of derived form of one model, there or not.

    Attributes:
        model: the ONNX file.
        kind: name of the folder beside it.
        version: everything but the weights that decides the content: libraries, our compiler.
        variant: what may lie side by side: a number format, a processor's abilities. Of each
            variant only the newest form stays.
    """

    model: Path
    kind: str
    version: str
    variant: str

    def find(self) -> Path | None:
        """The folder of a whole form of these very weights; nothing on disk changes.

        Raises:
            NotOnnx, OSError: the model cannot be read.
        """
        stamp = stamp_of(self.model)
        for folder in sorted(self._home.glob(f"{self._any_weights}-{self._suffix}")):
            manifest = _read_manifest(folder)
            if manifest is not None and manifest["sources"] == stamp:
                return folder
        return None

    def make(self, write: Callable[[Path], None], *, room_bytes: int = 0) -> Path:
        """Make the form and remove the ones it replaces; gives its folder.

        Weights that were only copied or touched are recognised by their digest, and their form is
        kept. Where another process was faster, its form is taken.

        Args:
            write: fills a new folder.
            room_bytes: what must be free on the disk.

        Raises:
            OSError: the disk is full or may not be written to.
            NotOnnx: the model cannot be read.
        """
        sources = weight_files(self.model)
        stamp, digest = stamp_files(sources), digest_files(sources)
        target = self._home / f"{self.model.stem}-{digest[:_DIGITS]}-{self._suffix}"
        self._home.mkdir(exist_ok=True)
        self._remove_abandoned()
        known = _read_manifest(target)
        if known is not None and known["sha256"] == digest:
            with contextlib.suppress(OSError):  # a read-only disk: it is as good as it was
                _write_manifest(target, {**known, "sources": stamp})
        else:
            _require_room(self._home, room_bytes)
            self._write(write, target, {"sources": stamp, "sha256": digest})
        self._remove_replaced(target)
        return target

    def discard(self, folder: Path) -> None:
        """Remove a form that was found and turned out to be bad, so that the next one is made."""
        shutil.rmtree(folder, ignore_errors=True)

    def _write(self, write: Callable[[Path], None], target: Path, facts: dict[str, Any]) -> None:
        staging = Path(tempfile.mkdtemp(prefix=_STAGING, dir=self._home))
        try:
            write(staging)
            files = sorted(file for file in staging.iterdir() if file.is_file())
            for file in files:
                _settle(file)
            sizes = {file.name: file.stat().st_size for file in files}
            _write_manifest(staging, {**facts, "files": sizes})
            staging.chmod(_FOLDER_MODE)
            _rename(staging, target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def _remove_replaced(self, target: Path) -> None:
        """Forms of other weights or versions in this variant: nothing would ever use them."""
        for old in self._home.glob(f"{self._any_weights}-*-{self.variant}"):
            if old != target:
                shutil.rmtree(old, ignore_errors=True)

    def _remove_abandoned(self) -> None:
        """What processes left that were killed while they made a form."""
        for left in self._home.glob(f"{_STAGING}*"):
            with contextlib.suppress(OSError):  # its maker may be done with it just now
                if time.time() - left.stat().st_mtime > ABANDONED_S:
                    shutil.rmtree(left, ignore_errors=True)

    @property
    def _home(self) -> Path:
        return self.model.parent / self.kind

    @property
    def _any_weights(self) -> str:
        """Pattern for the forms of this file, with whatever weights; others may lie beside it."""
        return f"{glob.escape(self.model.stem)}-{'?' * _DIGITS}"

    @property
    def _suffix(self) -> str:
        return f"{self.version}-{self.variant}"


def stamp_of(model: Path) -> Stamp:
    """What tells replaced weights without reading them: size and time of change of each file.

    Raises:
        NotOnnx, OSError: the model cannot be read.
    """
    return stamp_files(weight_files(model))


def digest_of(model: Path) -> str:
    """First 16 hexadecimal digits of the SHA-256 of a model's files; reads them all.

    Raises:
        NotOnnx, OSError: the model cannot be read.
    """
    return digest_files(weight_files(model))[:_DIGITS]


def source_digest(*folders: Path) -> str:
    """Eight hexadecimal digits for the Python source in `folders`, for the version of a form."""
    digest = hashlib.sha256()
    for folder in folders:
        for file in sorted(folder.rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:8]


def digest_files(sources: Sequence[Path]) -> str:
    """One SHA-256 of several files, hexadecimal."""
    total = hashlib.sha256()
    for file in sources:
        with file.open("rb") as stream:
            total.update(hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()


def stamp_files(sources: Sequence[Path]) -> Stamp:
    """What tells a replaced file without reading it: size and time of change in nanoseconds."""
    folder = sources[0].parent
    found = {str(file.relative_to(folder)): file.stat() for file in sources}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in found.items()}


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a form whose files are whole, else None."""
    try:
        manifest: dict[str, Any] = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        sizes = {name: (folder / name).stat().st_size for name in manifest["files"]}
        is_whole = sizes == manifest["files"] and {"sources", "sha256"} <= manifest.keys()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return manifest if is_whole else None


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    staged = folder / f"{_MANIFEST}.{os.getpid()}"
    staged.write_text(json.dumps(manifest), encoding="utf-8")
    _settle(staged)
    staged.replace(folder / _MANIFEST)


def _settle(file: Path) -> None:
    """Bring the content to the disk before the name: a power cut must not leave a hollow file."""
    file.chmod(_FILE_MODE)
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


def _rename(staging: Path, target: Path) -> None:
    """Put the folder in its place, over what is not whole there."""
    if _read_manifest(target) is None:
        shutil.rmtree(target, ignore_errors=True)
        with contextlib.suppress(OSError):  # another process may have put its own there meanwhile
            staging.rename(target)
    if _read_manifest(target) is None:
        raise OSError(f"{target} could not be put into place")


def _require_room(folder: Path, wanted_bytes: int) -> None:
    if shutil.disk_usage(folder).free < wanted_bytes:
        raise OSError(f"less than {format_bytes(wanted_bytes)} free on {folder}")
