"""Core ML through ONNX Runtime: official files on the Neural Engine, checked against the CPU.

The provider may quietly leave nodes to the CPU, serve a stale compiled model, or compute something
else. So the share of nodes it really runs is measured, compiled models are kept under the digest of
the weights, and each shape is compared with the CPU before its first answer.
"""

import hashlib
import logging
import platform
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from immich_ml_metal.backends.base import AnyModel
from immich_ml_metal.backends.coreml_session import (
    MIN_COSINE,
    Session,
    SessionMaker,
    cosine,
    open_session,
    provider_options,
    provider_share,
)
from immich_ml_metal.backends.coreml_shapes import BATCHES, Shapes, cut, label, pin
from immich_ml_metal.backends.ort import OrtGraph, session_options
from immich_ml_metal.backends.ort_prepared import weight_files
from immich_ml_metal.backends.tensor import build_model
from immich_ml_metal.config import Settings
from immich_ml_metal.device import Device, core_count
from immich_ml_metal.errors import InferenceError, LoadFailed
from immich_ml_metal.types import Graph, ModelFiles, ModelKey, Part, Task, Tensor

log = logging.getLogger(__name__)

FOLDER = "coreml"  # beside the model file
REFUSED = "coreml_refused"  # the reason given to `on_fallback`


class Refusal(Exception):
    """Core ML is not to be used for this model, and why."""


@dataclass(frozen=True, slots=True)
class Report:
    """What was found when a shape was first opened."""

    model: str
    shape: str
    share: float
    cosine: float


@dataclass(frozen=True, slots=True)
class Setup:
    """How one engine opens its sessions."""

    use_ane: bool
    make_session: SessionMaker = open_session
    environment: str = f"ort{ort.__version__}-{platform.system()}{platform.release()}"


class CoreMLGraph:
    """An ONNX file on Core ML: one session per shape, each checked against `reference` first."""

    fixed_shapes = True

    def __init__(
        self, path: Path, reference: Graph, setup: Setup, *, name: str, batches: Sequence[int]
    ) -> None:
        """Open the shapes that are known from the file.

        Raises:
            Refusal: Core ML rejects it, takes none of it, or computes something else.
        """
        self._path = path
        self._reference = reference
        self._setup = setup
        self._name = name
        self._batches = tuple(batches)
        self._cache = path.parent / FOLDER / f"{digest_of(path)}-{setup.environment}"
        self._sessions: dict[Shapes, Session] = {}
        self._lock = threading.Lock()  # the device has one thread; a second opener would be a bug
        self.reports: list[Report] = []
        self.inputs = reference.inputs
        self.outputs = reference.outputs
        self.metadata = reference.metadata
        self.size_bytes = reference.size_bytes
        _remove_others(self._cache)
        self._open_known()

    def _open_known(self) -> None:
        """Open the shapes that the file fixes; then the reference has done its work."""
        rows = {spec.name: _fixed(spec.shape[1:]) for spec in self.inputs}
        if any(len(rows[spec.name]) < len(spec.shape) - 1 for spec in self.inputs):
            return
        for batch in self._batches:
            self._session(tuple((name, (batch, *sides)) for name, sides in rows.items()))
        self._reference.close()

    @property
    def max_batch(self) -> int:
        """The largest compiled batch."""
        return max(self._batches)

    def run(self, feeds: Mapping[str, Tensor]) -> list[Tensor]:
        """Compute every output for any number of rows, in runs of compiled batches.

        Raises:
            InferenceError: a shape seen for the first time is refused, or the run fails.
        """
        rows = len(next(iter(feeds.values())))
        runs = [self._run(feeds, *piece) for piece in cut(rows, self._batches)]
        return [np.concatenate(parts) for parts in zip(*runs, strict=True)]

    def _run(self, feeds: Mapping[str, Tensor], start: int, stop: int, size: int) -> list[Tensor]:
        padded = {name: _pad(value[start:stop], size) for name, value in feeds.items()}
        shapes = tuple((name, value.shape) for name, value in padded.items())
        try:
            outputs = self._session(shapes).run(None, padded)
        except Exception as exc:  # its exceptions derive from Exception directly
            raise InferenceError(f"core ml: {self._name}: {exc}") from exc
        return [output[: stop - start] for output in outputs]

    def close(self) -> None:
        """Free every session."""
        self._sessions.clear()

    def _session(self, shapes: Shapes) -> Session:
        with self._lock:
            if shapes not in self._sessions:
                self._sessions[shapes] = self._open(shapes)
            return self._sessions[shapes]

    def _open(self, shapes: Shapes) -> Session:
        """Compile a shape and check it; its compiled form is kept beside the model."""
        folder = self._cache / f"{label(shapes)}-{'all' if self._setup.use_ane else 'gpu'}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            model = pin(self._path, shapes)
            options = provider_options(use_ane=self._setup.use_ane, cache=folder)
            session = self._setup.make_session(model, options)
        except (LoadFailed, OSError) as exc:
            raise Refusal(str(exc)) from exc
        report = self._check(session, shapes)
        is_kept = any(folder.iterdir())
        log.info(
            "core ml opened model=%s shape=%s node_share=%.2f cosine=%.6f compiled_kept=%s",
            *(report.model, report.shape, report.share, report.cosine, is_kept),
        )
        self.reports.append(report)
        return session

    def _check(self, session: Session, shapes: Shapes) -> Report:
        """Measure what Core ML took and compare a run with the CPU's.

        Raises:
            Refusal: nothing was taken, or the outputs differ.
        """
        share = provider_share(session)
        if share == 0:
            raise Refusal("onnx runtime gave core ml not one node of it")
        rng = np.random.default_rng(0)
        dtypes = {spec.name: spec.dtype for spec in self.inputs}
        feeds = {name: _noise(rng, shape, dtypes[name]) for name, shape in shapes}
        try:
            ours = session.run(None, feeds)
        except Exception as exc:  # its exceptions derive from Exception directly
            raise Refusal(f"core ml fails to run it: {exc}") from exc
        theirs = _row_by_row(self._reference, feeds)
        worst = min(cosine(one, other) for one, other in zip(ours, theirs, strict=True))
        if worst < MIN_COSINE:
            raise Refusal(
                f"core ml differs from the cpu: cosine {worst:.6f} at {label(shapes)}, "
                f"limit {MIN_COSINE}"
            )
        return Report(self._name, label(shapes), share, worst)


def _fixed(sides: Sequence[int | None]) -> tuple[int, ...]:
    return tuple(side for side in sides if side is not None)


def _remove_others(cache: Path) -> None:
    """Remove what was compiled for other weights or another runtime; it would never be used."""
    if cache.parent.is_dir():
        for other in cache.parent.iterdir():
            if other != cache:
                shutil.rmtree(other, ignore_errors=True)


def digest_of(path: Path) -> str:
    """First 16 hex digits of the SHA-256 of an ONNX file and its external data."""
    total = hashlib.sha256()
    for file in weight_files(path):
        with file.open("rb") as stream:
            total.update(hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()[:16]


def _pad(rows: Tensor, size: int) -> Tensor:
    """Repeat the last row up to `size` rows: a real row cannot overflow where zeros might."""
    if len(rows) == size:
        return rows
    return np.concatenate([rows, np.repeat(rows[-1:], size - len(rows), axis=0)])


def _noise(rng: np.random.Generator, shape: Sequence[int], dtype: np.dtype[Any]) -> Tensor:
    """Random input in the range of a normalised picture, of bytes, or of low token numbers."""
    if np.issubdtype(dtype, np.floating):
        return rng.uniform(-1, 1, shape).astype(dtype)
    return rng.integers(0, 256, shape).astype(dtype)


def _row_by_row(graph: Graph, feeds: Mapping[str, Tensor]) -> list[Tensor]:
    """Outputs of the reference, which may only know batches of one."""
    rows = len(next(iter(feeds.values())))
    runs = [
        graph.run({name: value[row : row + 1] for name, value in feeds.items()})
        for row in range(rows)
    ]
    return [np.concatenate(parts) for parts in zip(*runs, strict=True)]


class CoreMLEngine:
    """Runs Immich's files through Core ML; a model it computes wrongly stays on the CPU.

    With `is_explicit` (Core ML was asked for by name) a refusal is an error instead.
    """

    name = "coreml"
    needs_files = True

    def __init__(
        self,
        settings: Settings,
        setup: Setup,
        *,
        is_explicit: bool = False,
        on_fallback: Callable[[str], None] = lambda reason: None,
    ) -> None:
        self._settings = settings
        self._setup = setup
        self._is_explicit = is_explicit
        self._on_fallback = on_fallback
        self._refused: set[Path] = set()
        self.device = Device(self.name)

    def load(self, key: ModelKey, files: ModelFiles | None) -> AnyModel:
        """Open the graph on Core ML, check it, and bind it to its task.

        Raises:
            LoadFailed: the files are broken, or Core ML was asked for by name and is refused.
        """
        assert files is not None, "the coreml engine needs files"
        threads = self._settings.intra_op_threads or core_count()
        reference = OrtGraph(files.graph, options=session_options(threads))
        graph: Graph = reference
        if files.graph not in self._refused:
            graph = self._try(key, files, reference)
        return build_model(key, files, graph, self._settings)

    def _try(self, key: ModelKey, files: ModelFiles, reference: OrtGraph) -> Graph:
        try:
            return CoreMLGraph(
                files.graph, reference, self._setup, name=str(key), batches=_batches(key, reference)
            )
        except Refusal as exc:
            if self._is_explicit:
                raise LoadFailed(f"{key}: {exc}") from exc
            self._refused.add(files.graph)
            self._on_fallback(REFUSED)
            log.warning("core ml refused, the cpu answers instead: model=%s reason=%s", key, exc)
            return reference


def _batches(key: ModelKey, graph: Graph) -> tuple[int, ...]:
    """Batches that a model can be pinned to.

    ArcFace's exports say one face but hold no other one in the graph; Immich itself rewrites them.
    """
    is_arcface = (key.task, key.part) == (Task.FACES, Part.RECOGNITION)
    is_free = all(spec.shape and spec.shape[0] is None for spec in graph.inputs)
    return BATCHES if is_arcface or is_free else BATCHES[:1]


def create_coreml(
    settings: Settings, *, is_explicit: bool, on_fallback: Callable[[str], None]
) -> CoreMLEngine:
    """Make the engine from settings."""
    setup = Setup(use_ane=settings.use_ane)
    return CoreMLEngine(settings, setup, is_explicit=is_explicit, on_fallback=on_fallback)
