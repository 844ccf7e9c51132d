"""Core ML through ONNX Runtime: official files on the GPU or the Neural Engine.

In float32, as the files are, Core ML uses the GPU and the CPU; a float16 form of a file is what may
run on the Neural Engine.

The provider may quietly leave nodes to the CPU, or serve a stale compiled model. So the share of
nodes it really runs is measured, and compiled models are kept under the digest of the weights. That
it computes what the CPU does is found by `qualification`.
"""

import logging
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from immich_ml_metal.backends.base import AnyModel
from immich_ml_metal.backends.build import build_model
from immich_ml_metal.backends.coreml.graph import (
    FLOAT16,
    FLOAT32,
    CoreMLGraph,
    Refusal,
    Setup,
    ShapeReport,
    compiled_form,
)
from immich_ml_metal.backends.coreml.session import SessionMaker, open_session
from immich_ml_metal.backends.coreml.shapes import BATCHES
from immich_ml_metal.backends.device import Device
from immich_ml_metal.backends.ort.session import OrtGraph, session_options
from immich_ml_metal.errors import LoadFailed
from immich_ml_metal.settings import Settings
from immich_ml_metal.threads import inference_cores
from immich_ml_metal.types import Graph, ModelFiles, ModelKey, Part, Task

log = logging.getLogger(__name__)

REFUSED = "coreml_refused"  # the reason given to `on_fallback`


class CoreMLEngine:
    """Runs Immich's files through Core ML; a model that it does not take stays on the CPU.

    With `is_explicit` (Core ML was asked for by name) a refusal is an error instead.
    """

    name = "coreml"
    needs_files = True
    number_formats = frozenset({FLOAT32, FLOAT16})

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
        self._refused: dict[tuple[Path, str], tuple[ModelKey, str]] = {}
        self._reports: dict[tuple[str, str, str], ShapeReport] = {}
        self.device = Device(self.name)

    def load(
        self, key: ModelKey, files: ModelFiles | None, number_format: str | None = None
    ) -> AnyModel:
        """Open the graph on Core ML and bind it to its task.

        `number_format` is one of `number_formats`; float32, that of the files, when None.

        Raises:
            LoadFailed: the files are broken, or Core ML was asked for by name and is refused.
        """
        assert files is not None, "the coreml engine needs files"
        threads = self._settings.intra_op_threads or inference_cores()
        reference = OrtGraph(files.graph, options=session_options(threads))
        setup = replace(self._setup, number_format=number_format or FLOAT32)
        graph: Graph = reference
        if (files.graph, setup.number_format) not in self._refused:
            graph = self._try(key, files, reference, setup)
        return build_model(key, files, graph, self._settings)

    def describe(self) -> dict[str, Any]:
        """What was opened and what was refused, for `/health`. Any thread."""
        return {
            "opened": [asdict(report) for report in list(self._reports.values())],
            "refused": {str(key): reason for key, reason in list(self._refused.values())},
        }

    def _keep(self, report: ShapeReport) -> None:
        self._reports[report.model, report.number_format, report.shape] = report

    def _try(self, key: ModelKey, files: ModelFiles, reference: OrtGraph, setup: Setup) -> Graph:
        graph = CoreMLGraph(
            compiled_form(files.graph, setup),
            reference,
            setup,
            name=str(key),
            batches=_batches(key, reference),
            on_report=self._keep,
        )
        try:
            graph.keep_compiled()
            if graph.open_fixed_shapes():
                reference.close()
        except Refusal as exc:
            if self._is_explicit:
                raise LoadFailed(f"{key}: {exc}") from exc
            self._refused[files.graph, setup.number_format] = (key, str(exc))
            self._on_fallback(REFUSED)
            log.warning("core ml refused, the cpu answers instead: model=%s reason=%s", key, exc)
            return reference
        return graph


def _batches(key: ModelKey, graph: Graph) -> tuple[int, ...]:
    """Batches that a model can be pinned to.

    ArcFace's exports say one face but hold no other one in the graph; Immich itself rewrites them.
    """
    is_arcface = (key.task, key.part) == (Task.FACES, Part.RECOGNITION)
    is_free = all(spec.shape and spec.shape[0] is None for spec in graph.inputs)
    return BATCHES if is_arcface or is_free else BATCHES[:1]


def create_coreml(
    settings: Settings,
    *,
    is_explicit: bool,
    on_fallback: Callable[[str], None],
    make_session: SessionMaker = open_session,
) -> CoreMLEngine:
    """Make the engine from settings."""
    setup = Setup(use_ane=settings.use_ane, make_session=make_session)
    return CoreMLEngine(settings, setup, is_explicit=is_explicit, on_fallback=on_fallback)
