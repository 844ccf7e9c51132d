"""What can be deleted from the model folder, and deleting it; nothing goes without being listed."""

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from immich_ml_metal.catalog import ModelSpec, all_models
from immich_ml_metal.errors import DownloadFailed
from immich_ml_metal.models.file_lock import Held, hold
from immich_ml_metal.models.shelf import STAGING, Shelf
from immich_ml_metal.system.disk import reason_of

# Builds of the official service for hardware that this one does not use.
_FOREIGN = ("*.armnn", "*.rknn")


@dataclass(frozen=True, slots=True)
class Waste:
    """Something that can go: where, why, and how much it frees."""

    path: Path
    reason: str
    size_bytes: int


def find_waste(shelf: Shelf, keep: frozenset[str] | None = None) -> list[Waste]:
    """Unfinished downloads and files for other hardware; with `keep`, every other model too.

    What cannot be read is passed over; `Shelf.unreadable` names it.
    """
    found = list(_find_leftovers(shelf.models_dir))
    if keep is not None:
        found += [
            Waste(folder, "not configured", _size_of(folder))
            for spec in all_models()
            if spec.name not in keep
            and _can_read(folder := shelf.models_dir / spec.task / spec.name)
        ]
    return [
        waste for waste in found if not any(other.path in waste.path.parents for other in found)
    ]


def remove(shelf: Shelf, waste: Waste) -> None:
    """Delete one thing that `find_waste` listed.

    Raises:
        DownloadFailed: it is in use by a download, or cannot be deleted.
    """
    relative = waste.path.relative_to(shelf.models_dir).parts
    try:
        with ExitStack() as locks:
            for path in (shelf.models_dir / ".locks").glob(f"{'--'.join(relative[:2])}--*.lock"):
                locks.enter_context(hold(path))
            if waste.path.is_dir() and not waste.path.is_symlink():
                shutil.rmtree(waste.path)
            else:
                waste.path.unlink(missing_ok=True)
    except Held as exc:
        raise DownloadFailed(f"{waste.path} is being downloaded to; try again later") from exc
    except OSError as exc:
        raise DownloadFailed(f"cannot delete {waste.path}: {reason_of(exc)}") from exc


def folder_of(shelf: Shelf, spec: ModelSpec) -> Waste | None:
    """Everything of one model on disk, all revisions; None when there is nothing."""
    folder = shelf.models_dir / spec.task / spec.name
    return Waste(folder, "asked for", _size_of(folder)) if folder.is_dir() else None


def _find_leftovers(models_dir: Path) -> Iterator[Waste]:
    for spec in all_models():
        folder = models_dir / spec.task / spec.name
        if not _can_read(folder):
            continue
        for staging in folder.rglob(STAGING):
            if size := _size_of(staging):
                yield Waste(staging, "unfinished download", size)
        for pattern in _FOREIGN:
            for path in folder.rglob(pattern):
                yield Waste(path, "for other hardware", path.stat().st_size)


def _can_read(folder: Path) -> bool:
    """Whether it is a folder, and ours to look into."""
    return os.path.isdir(folder) and os.access(folder, os.R_OK | os.X_OK)  # noqa: PTH112 - never raises


def _size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
