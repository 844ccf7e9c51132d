"""Bring models from a folder or a ZIP: an Immich cache, an InsightFace pack, an export on a stick.

What is there is told by the paths, copied beside its target, checked, and renamed into place. A
half that is already usable is left as it is.
"""

import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from immich_ml_metal.catalog import find_by_name, get_model
from immich_ml_metal.errors import DownloadFailed, ModelUnavailable
from immich_ml_metal.models.file_lock import Held, hold, patiently
from immich_ml_metal.models.manifest import (
    NAME,
    FileRecord,
    load_manifest,
    save_manifest,
    sha256_of,
)
from immich_ml_metal.models.remote import require_space
from immich_ml_metal.models.shelf import GRAPH, STAGING, Shelf, check_part, is_for_us, is_usable
from immich_ml_metal.system.disk import explain_write
from immich_ml_metal.types import ModelKey, Part, Task

# The files of InsightFace's own packs: which half of which packs each is (public pack contents).
_PACK_DETECTORS = {
    "det_10g.onnx": "buffalo_l",
    "det_2.5g.onnx": "buffalo_m",
    "det_500m.onnx": "buffalo_s",
    "scrfd_10g_bnkps.onnx": "antelopev2",
}
# What `zipfile` raises on a broken archive; RuntimeError for one with a password.
_BAD_ZIP = (zipfile.BadZipFile, zlib.error, EOFError, ValueError, OverflowError, RuntimeError)
_REVISIONS = ("v2",)  # folders between a name and its halves, as Immich makes them
_PACK_RECOGNISERS = {
    "w600k_r50.onnx": ("buffalo_l", "buffalo_m"),
    "w600k_mbf.onnx": ("buffalo_s",),
    "glintr100.onnx": ("antelopev2",),
}


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of a folder or ZIP."""

    size_bytes: int
    open: Callable[[], IO[bytes]]


@dataclass(frozen=True, slots=True)
class Found:
    """One half found at the source: its files by path relative to the model's folder."""

    key: ModelKey
    revision: str
    files: Mapping[str, SourceFile]

    @property
    def size_bytes(self) -> int:
        """All its files."""
        return sum(entry.size_bytes for entry in self.files.values())


@dataclass(frozen=True, slots=True)
class Imported:
    """What became of one half: `imported`, `present` (already usable here) or `refused`."""

    found: Found
    outcome: str
    reason: str = ""


@contextmanager
def open_tree(source: Path) -> Iterator[dict[PurePosixPath, SourceFile]]:
    """The files of a folder or ZIP by path.

    Raises:
        ModelUnavailable: it is neither, or a damaged ZIP, which may show when a file is read.
    """
    if source.is_dir():
        yield {
            PurePosixPath(source.name, *path.relative_to(source).parts): _on_disk(path)
            for path in source.rglob("*")
            if path.is_file()
        }
    elif zipfile.is_zipfile(source):
        try:
            with zipfile.ZipFile(source) as archive:
                yield {
                    PurePosixPath(source.stem, info.filename): _in_zip(archive, info)
                    for info in archive.infolist()
                    if not info.is_dir()
                }
        except _BAD_ZIP as exc:
            raise ModelUnavailable(f"{source} is damaged: {exc}") from exc
    else:
        raise ModelUnavailable(f"{source} is neither a folder nor a ZIP file")


def find_models(tree: Mapping[PurePosixPath, SourceFile]) -> list[Found]:
    """Every half of an official model in a tree, wherever it lies in it."""
    found = [
        half
        for path in tree
        if path.name == GRAPH and STAGING not in path.parts and (half := _cached(path, tree))
    ]
    return found + _find_packs(tree)


def import_model(shelf: Shelf, found: Found) -> Imported:
    """Copy one half to its place, checking it first; never over a usable one.

    Raises:
        DownloadFailed: the disk is full or cannot be written, or it is being downloaded right now.
    """
    spec, key = find_by_name(found.key.name), found.key
    here = Shelf(shelf.models_dir, found.revision)
    lock = here.lock_path(key, key.part)
    try:
        with hold(lock):
            if here.status(spec, key.part).is_usable:
                return Imported(found, "present")
            return _bring(here, found)
    except Held as exc:
        raise DownloadFailed(f"{key} is being downloaded by another process") from exc
    except OSError as exc:
        raise DownloadFailed(explain_write(exc, here.root(key), "ML_MODELS_DIR")) from exc


def export_models(shelf: Shelf, names: list[str], target: Path) -> list[Path]:
    """Copy models with their manifests to a folder, or into a new ZIP, in Immich's layout.

    Returns:
        The files written, relative to the target.

    Raises:
        ModelUnavailable: a model is not on disk.
        DownloadFailed: the target cannot be written.
    """
    files = {path: source for name in names for path, source in _files_of(shelf, name)}
    try:
        if target.suffix == ".zip":
            _write_zip(files, target)
        else:
            target.mkdir(parents=True, exist_ok=True)
            require_space(target, sum(source.stat().st_size for source in files.values()))
            for path, source in files.items():
                _copy(_on_disk(source), target / path)
    except OSError as exc:
        raise DownloadFailed(explain_write(exc, target)) from exc
    return list(files)


# -- finding ---------------------------------------------------------------------------------------


def _cached(graph: PurePosixPath, tree: Mapping[PurePosixPath, SourceFile]) -> Found | None:
    """The half whose graph lies at `<name>[/<revision>]/<part>/model.onnx`."""
    part, *above = graph.parent.parts[::-1]
    if part not in tuple(Part) or not above:
        return None
    name, revision = above[0], "main"
    if get_model(name) is None and len(above) > 1 and name in _REVISIONS:
        name, revision = above[1], name
    spec = get_model(name)
    if spec is None or Part(part) not in spec.parts:
        return None
    folder, root = graph.parent, graph.parent.parent
    files = {
        str(path.relative_to(root)): entry
        for path, entry in tree.items()
        if folder in path.parents or path in (root / "config.json", root / NAME)
    }
    wanted = {p: e for p, e in files.items() if is_for_us(p, Part(part)) or p == NAME}
    return Found(spec.key(Part(part)), revision, wanted)


def _find_packs(tree: Mapping[PurePosixPath, SourceFile]) -> list[Found]:
    found = []
    for path, entry in tree.items():
        pack = _PACK_DETECTORS.get(path.name)
        if pack is None:
            continue
        found.append(_face(pack, Part.DETECTION, entry))
        found += [
            _face(pack, Part.RECOGNITION, other)
            for beside, other in tree.items()
            if beside.parent == path.parent and pack in _PACK_RECOGNISERS.get(beside.name, ())
        ]
    return found


def _face(pack: str, part: Part, entry: SourceFile) -> Found:
    return Found(ModelKey(Task.FACES, part, pack), "main", {f"{part}/{GRAPH}": entry})


# -- copying ---------------------------------------------------------------------------------------


def _bring(here: Shelf, found: Found) -> Imported:
    key, root = found.key, here.root(found.key)
    staging = root / STAGING / f"import-{key.part}"
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        require_space(staging, found.size_bytes)
        for path, entry in found.files.items():
            _copy(entry, staging / path)
        states = check_part(staging, find_by_name(key.name), key.part, digests=True)
        bad = [f"{path} is {state}" for path, state in states.items() if not _is_fine(state)]
        if not is_usable(states):
            return Imported(found, "refused", "; ".join(bad))
        _install(here, key, staging, list(found.files))
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return Imported(found, "imported")


def _is_fine(state: str) -> bool:
    return state in ("verified", "unverified")


def _install(here: Shelf, key: ModelKey, staging: Path, paths: list[str]) -> None:
    root = here.root(key)
    records = {
        path: record
        for path, record in load_manifest(staging).files.items()
        if path in paths and _holds(staging / path, record)
    }
    if records:
        with hold(here.lock_path(key, "manifest"), wait=patiently):
            save_manifest(root, load_manifest(root).with_files(records))
    for path in sorted(paths, key=lambda path: path.endswith(GRAPH)):
        if path == NAME or (path == "config.json" and (root / path).exists()):
            continue
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (staging / path).replace(root / path)


def _holds(path: Path, record: FileRecord) -> bool:
    """Whether a record brought along tells the truth."""
    return path.stat().st_size == record.size_bytes and sha256_of(path) == record.sha256


def _files_of(shelf: Shelf, name: str) -> Iterator[tuple[Path, Path]]:
    spec = find_by_name(name)
    root = shelf.root(spec.key(spec.parts[0]))
    found = False
    for part in spec.parts:
        status = shelf.status(spec, part)
        if status.is_usable:
            found = True
            for path in status.files:
                yield (root / path).relative_to(shelf.models_dir), root / path
    if not found:
        raise ModelUnavailable(f"{name} is not on disk; `models pull {name}` fetches it")
    if (root / NAME).exists():
        yield (root / NAME).relative_to(shelf.models_dir), root / NAME


def _write_zip(files: Mapping[Path, Path], target: Path) -> None:
    partial = target.with_name(f"{target.name}.partial")
    try:
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:  # weights do not shrink
            for path, source in files.items():
                archive.write(source, path.as_posix())
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _copy(entry: SourceFile, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.partial")
    try:
        with entry.open() as source, partial.open("wb") as out:
            shutil.copyfileobj(source, out, 2**20)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _on_disk(path: Path) -> SourceFile:
    return SourceFile(path.stat().st_size, lambda: path.open("rb"))


def _in_zip(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> SourceFile:
    return SourceFile(info.file_size, lambda: archive.open(info))
