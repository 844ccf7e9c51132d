"""An ONNX file on Core ML: one session per shape, compiled once."""

import hashlib
import inspect
import logging
import platform
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import onnxruntime as ort

from immich_ml_metal.backends.coreml import adapt as adapting
from immich_ml_metal.backends.coreml import edit, half
from immich_ml_metal.backends.coreml.adapt import adapt
from immich_ml_metal.backends.coreml.half import FILE as HALF_FILE
from immich_ml_metal.backends.coreml.half import write_half
from immich_ml_metal.backends.coreml.session import (
    Session,
    SessionMaker,
    open_fed,
    open_session,
    provider_options,
    provider_share,
)
from immich_ml_metal.backends.coreml.shapes import Shapes, cut, label, read_pinned
from immich_ml_metal.errors import InferenceError, LoadFailed
from immich_ml_metal.onnx_files.derived import DerivedForm
from immich_ml_metal.onnx_files.protobuf import NotOnnx
from immich_ml_metal.types import Graph, Tensor

log = logging.getLogger(__name__)

FOLDER = "coreml"  # beside the model file
FLOAT32, FLOAT16 = "float32", "float16"


class Refusal(Exception):
    """Core ML is not to be used for this model, and why."""


@dataclass(frozen=True, slots=True)
class ShapeReport:
    """What a shape was opened as: the `share` of its nodes on Core ML, and passes of `adapt`."""

    model: str
    shape: str
    share: float
    number_format: str
    adapted: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Setup:
    """How one engine opens its sessions; `number_format` is float32 or float16."""

    use_ane: bool
    number_format: str = FLOAT32
    make_session: SessionMaker = open_session
    environment: str = f"ort{ort.__version__}-{platform.system()}{platform.release()}"


class CoreMLGraph:
    """An ONNX file on Core ML: one session per shape. Who compares it: `qualification`.

    Opens nothing by itself: `open_fixed_shapes` opens what is known from the file, `run` the rest.
    `form` is the file and where its compiled models are kept; `reference`, the same file on the
    CPU, tells inputs and outputs and stays the caller's; `batches` are the numbers of rows to
    compile; `on_report` is told what a new shape was opened as.
    """

    fixed_shapes = True

    def __init__(
        self,
        form: DerivedForm,
        reference: Graph,
        setup: Setup,
        *,
        name: str,
        batches: Sequence[int],
        on_report: Callable[[ShapeReport], None],
    ) -> None:
        self._form = form
        self._setup = setup
        self._name = name
        self._batches = tuple(batches)
        self._cache: Path | None = None
        self._sessions: dict[Shapes, Session] = {}
        self._lock = threading.Lock()  # the device has one thread; a second opener would be a bug
        self._on_report = on_report
        self.inputs, self.outputs = reference.inputs, reference.outputs
        self.metadata = reference.metadata
        self.size_bytes = reference.size_bytes

    def keep_compiled(self) -> None:
        """Find the folder of compiled models, or make it in place of one for other weights.

        Raises:
            Refusal: the folder cannot be written to, or the model not be read.
        """
        try:
            self._cache = self._form.find() or self._form.make(self._fill)
        except (OSError, NotOnnx, LoadFailed) as exc:
            raise Refusal(str(exc)) from exc

    def _fill(self, folder: Path) -> None:
        """What a new folder of compiled models starts with: the converted file, if any."""
        if self._setup.number_format == FLOAT16:
            write_half(self._form.model, folder)

    def open_fixed_shapes(self) -> bool:
        """Open every shape that the file fixes; False if it leaves some open.

        Where True, no other shape can come, and the reference has done its work.

        Raises:
            Refusal: Core ML rejects one, or takes none of it.
        """
        rows = {spec.name: _fixed(spec.shape[1:]) for spec in self.inputs}
        if any(len(rows[spec.name]) < len(spec.shape) - 1 for spec in self.inputs):
            return False
        for batch in self._batches:
            self._session(tuple((name, (batch, *sides)) for name, sides in rows.items()))
        return True

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
        """Compile a shape, or take what was compiled before and is kept beside the model.

        Raises:
            Refusal: Core ML rejects it, or takes none of it.
        """
        assert self._cache is not None, "keep_compiled comes first"
        folder = self._cache / label(shapes)
        is_half = self._setup.number_format == FLOAT16
        try:
            folder.mkdir(exist_ok=True)
            model = read_pinned(self._cache / HALF_FILE if is_half else self._form.model, shapes)
            adapted = adapt(model)
            options = provider_options(use_ane=self._setup.use_ane, cache=folder)
            session = open_fed(self._setup.make_session, model, options)
        except (LoadFailed, OSError) as exc:
            raise Refusal(str(exc)) from exc
        share = provider_share(session)
        if share == 0:
            raise Refusal("onnx runtime gave core ml not one node of it")
        number_format = self._setup.number_format
        report = ShapeReport(self._name, label(shapes), share, number_format, adapted)
        log.info(
            "core ml opened model=%s format=%s shape=%s node_share=%.2f adapted=%s kept=%s",
            *(self._name, number_format, report.shape, share),
            *(",".join(adapted) or "nothing", any(folder.iterdir())),
        )
        self._on_report(report)
        return session


def _fixed(sides: Sequence[int | None]) -> tuple[int, ...]:
    return tuple(side for side in sides if side is not None)


def compiled_form(path: Path, setup: Setup) -> DerivedForm:
    """Where the compiled models of an ONNX file are kept, in a folder for each shape."""
    units = "all" if setup.use_ane else "gpu"
    version = f"{setup.environment}-{_passes_digest()}"
    return DerivedForm(path, FOLDER, version=version, variant=f"{units}-{setup.number_format}")


@cache
def _passes_digest() -> str:
    """Digest of what changes a graph: other passes may leave another one to compile."""
    sources = (inspect.getsource(module) for module in (adapting, edit, half))
    return hashlib.sha256("".join(sources).encode()).hexdigest()[:8]


def _pad(rows: Tensor, size: int) -> Tensor:
    """Repeat the last row up to `size` rows: a real row cannot overflow where zeros might."""
    if len(rows) == size:
        return rows
    return np.concatenate([rows, np.repeat(rows[-1:], size - len(rows), axis=0)])
