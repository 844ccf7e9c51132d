"""Where models lie on disk, and what state each file of one half is in. No network.

The layout is Immich's own, so that an existing cache folder can be mounted or copied:
`<models_dir>/<task>/<name>[/<revision> if not main]/<part>/model.onnx`.
"""

import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from immich_ml_metal.catalog import Family, ModelSpec
from immich_ml_metal.errors import what_ran_out
from immich_ml_metal.models.manifest import FileRecord, load_manifest, sha256_of
from immich_ml_metal.onnx_files.protobuf import NotOnnx
from immich_ml_metal.onnx_files.references import external_files
from immich_ml_metal.types import ModelFiles, ModelKey, Part, Task

STAGING = ".incoming"  # beside the target, so that a rename never crosses a file system
GRAPH = "model.onnx"


# Builds for other hardware beside the ONNX files, the repository's own paperwork, and every name
# that begins with a dot: so no path from a hub can climb out of the model's folder. Nor one with a
# control character: no file system takes a NUL.
_NOT_OURS = re.compile(r"(\.armnn|\.rknn)$|(^|/)(rknpu|fp16)/|(^|/)\.|^README\.md$|[\x00-\x1f\x7f]")


class FileState(StrEnum):
    """What is known of a file."""

    VERIFIED = "verified"  # as downloaded: size and, when asked for, digest match the record
    UNVERIFIED = "unverified"  # placed by hand and readable; used as it is
    DAMAGED = "damaged"  # torn, or not what was downloaded
    UNREADABLE = "unreadable"  # it, or its folder, belongs to another user
    MISSING = "missing"


@dataclass(frozen=True, slots=True)
class PartStatus:
    """What is known of one half.

    Attributes:
        files: the state of each file, by path relative to the model's folder.
        size_bytes: what its files occupy.
        elsewhere: the state of the same file in another place, which then serves: the rapidocr
            wheel, or the folder where an older server kept what several text models share.
    """

    key: ModelKey
    files: Mapping[str, FileState]
    size_bytes: int
    elsewhere: FileState | None = None

    @property
    def state(self) -> FileState:
        """The half as a whole: usable only when every file is, verified only when every file is."""
        if self.elsewhere is not None:
            return self.elsewhere
        found = set(self.files.values())
        if found == {FileState.VERIFIED}:
            return FileState.VERIFIED
        for state in (FileState.UNREADABLE, FileState.DAMAGED, FileState.MISSING):
            if state in found:
                return state
        return FileState.UNVERIFIED

    @property
    def is_usable(self) -> bool:
        """Whether it can be loaded."""
        return self.elsewhere is not None or is_usable(self.files)


@dataclass(frozen=True, slots=True)
class Shelf:
    """The model folder at one revision."""

    models_dir: Path
    revision: str

    def root(self, key: ModelKey) -> Path:
        """The folder that both halves of a model share."""
        root = self.models_dir / key.task / key.name
        return root if self.revision == "main" else root / self.revision

    def files(self, key: ModelKey) -> ModelFiles:
        """Where a half lies, or would lie."""
        root = self.root(key)
        return ModelFiles(graph=root / key.part / GRAPH, folder=root / key.part, root=root)

    def staging(self, key: ModelKey) -> Path:
        """Where a half is downloaded before it is renamed into place."""
        return self.root(key) / STAGING / key.part

    def status(self, spec: ModelSpec, part: Part, *, digests: bool = False) -> PartStatus:
        """What is on disk of one half; `digests` as in `check_part`."""
        key = spec.key(part)
        states = check_part(self.root(key), spec, part, digests=digests)
        size = sum(_size(self.root(key) / path) for path in states)
        return PartStatus(key, states, size)

    def unreadable(self) -> list[str]:
        """A sentence for each folder of models that cannot be read; the others serve all the same.

        Looks at the folders of tasks and of models, not into them.
        """
        return [f"{path}: {why}" for path, why in _unreadable(self.models_dir)]

    def unreadable_of(self, key: ModelKey) -> str:
        """The first place of one half that cannot be read, and why; empty when there is none."""
        files = self.files(key)
        for path in (self.models_dir, files.root.parent, files.root, files.folder, files.graph):
            try:
                path.stat()
                if not os.access(path, os.R_OK | (os.X_OK if path.is_dir() else 0)):
                    return f"{path}: permission denied"
            except (FileNotFoundError, NotADirectoryError):
                return ""
            except OSError as exc:
                return f"{path}: {(exc.strerror or str(exc)).lower()}"
        return ""

    def lock_path(self, key: ModelKey, what: str) -> Path:
        """The lock file for one half (`what` is the part), or for the manifest."""
        name = f"{key.task}--{key.name}--{self.revision}--{what}.lock"
        return self.models_dir / ".locks" / name


def check_part(
    root: Path, spec: ModelSpec, part: Part, *, digests: bool = False
) -> Mapping[str, FileState]:
    """The state of every file of one half, by path relative to `root`.

    Args:
        root: the model's folder.
        spec: which model.
        part: which half.
        digests: read every recorded file and compare its SHA-256, instead of sizes only.
    """
    records = load_manifest(root).files
    paths = {*_required(spec, part), *(p for p in records if p.startswith(f"{part}/"))}
    paths |= {p for p in records if "/" not in p and _size(root / p)}  # both halves' files
    sides = _side_files(root / part / GRAPH)
    paths |= {f"{part}/{name}" for name in sides}
    return {
        path: _state(root / path, records.get(path), sides.get(path.partition("/")[2]), digests)
        for path in sorted(paths)
    }


def is_for_us(path: str, part: Part) -> bool:
    """Whether a file is needed for one half; external data lies in the half's folder."""
    wanted = path == "config.json" or path.startswith(f"{part}/")
    return wanted and not _NOT_OURS.search(path)


def is_usable(states: Mapping[str, FileState]) -> bool:
    """Whether a half in these states can be loaded."""
    return all(state in (FileState.VERIFIED, FileState.UNVERIFIED) for state in states.values())


def _required(spec: ModelSpec, part: Part) -> tuple[str, ...]:
    graph = f"{part}/{GRAPH}"
    if spec.task is not Task.CLIP:
        return (graph,)
    if part is Part.VISUAL:
        return (graph, f"{part}/preprocess_cfg.json")
    config = ("config.json",) if spec.family is Family.OPENCLIP else ()
    return (graph, f"{part}/tokenizer.json", f"{part}/tokenizer_config.json", *config)


def _side_files(graph: Path) -> dict[str, int]:
    """External-data files by name, with the least size each must have."""
    try:
        return {side.location: side.min_bytes for side in external_files(graph)}
    except (OSError, NotOnnx, RecursionError) as exc:
        if what_ran_out(exc):  # the file may be right
            raise
        return {}  # absent or torn: `_state` says so of the graph itself


def _unreadable(folder: Path, depth: int = 2) -> Iterator[tuple[Path, str]]:
    try:
        inside = sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as exc:
        yield folder, (exc.strerror or str(exc)).lower()
        return
    for path in inside if depth else ():
        if not path.name.startswith("."):
            yield from _unreadable(path, depth - 1)


def _state(
    path: Path, record: FileRecord | None, min_bytes: int | None, digests: bool
) -> FileState:
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            return FileState.MISSING
        return _state_of_file(path, found.st_size, record, min_bytes, digests)
    except (FileNotFoundError, NotADirectoryError):
        return FileState.MISSING
    except OSError as exc:  # it, or its folder, is somebody else's; or the disk is failing
        if what_ran_out(exc):
            raise
        return FileState.UNREADABLE


def _state_of_file(
    path: Path, size: int, record: FileRecord | None, min_bytes: int | None, digests: bool
) -> FileState:
    if not os.access(path, os.R_OK):
        return FileState.UNREADABLE
    if record is not None and size == record.size_bytes:
        intact = not digests or sha256_of(path) == record.sha256
        return FileState.VERIFIED if intact else FileState.DAMAGED
    if size < (min_bytes or 0) or not _is_sound(path):
        return FileState.DAMAGED
    return FileState.UNVERIFIED


def _size(path: Path) -> int:
    try:
        return path.stat().st_size if path.is_file() else 0
    except OSError:
        return 0


def _is_sound(path: Path) -> bool:
    """Whether a file without a matching record is at least whole in its own format."""
    try:
        if path.suffix == ".onnx":
            external_files(path)
        elif path.suffix == ".json":
            json.loads(path.read_bytes())
    except (ValueError, RecursionError):  # torn, or nested deeper than anything honest
        return False
    return True
