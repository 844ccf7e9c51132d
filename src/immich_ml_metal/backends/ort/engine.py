"""ONNX Runtime: the portable engine, and the reference for the others.

Models are prepared once (`prepared`) and mapped; sessions follow the load
(`adaptive`).
"""

import logging
import subprocess
from collections.abc import Collection
from functools import partial
from pathlib import Path

import onnxruntime as ort

from immich_ml_metal.backends.base import AnyModel
from immich_ml_metal.backends.build import build_model
from immich_ml_metal.backends.device import Device
from immich_ml_metal.backends.ort.adaptive import AdaptiveGraph, CoreLoad
from immich_ml_metal.backends.ort.prepared import (
    GRAPH,
    prepare_in_child,
    prepared_form,
    worth_preparing,
)
from immich_ml_metal.backends.ort.session import OrtGraph, session_options
from immich_ml_metal.errors import LoadFailed, what_ran_out
from immich_ml_metal.onnx_files.protobuf import NotOnnx
from immich_ml_metal.onnx_graph.rewriting import chosen_rewritings
from immich_ml_metal.settings import Settings
from immich_ml_metal.threads import inference_cores
from immich_ml_metal.types import ModelFiles, ModelKey, Part
from immich_ml_metal.urgency import Urgency, urgency_of

log = logging.getLogger(__name__)


class OrtEngine:
    """Runs Immich's files on the CPU."""

    name = "cpu"
    needs_files = True

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._cores = settings.intra_op_threads or inference_cores()
        # Alone in its class is alone: the more urgent class takes the cores that it wants.
        self._loads = {one: CoreLoad() for one in Urgency}
        self.device = Device("cpu", width=inference_cores(), has_lanes=True)

    def load(self, key: ModelKey, files: ModelFiles | None) -> AnyModel:
        """Open the graph, from its prepared form where that pays, and bind it to its task."""
        assert files is not None, "the cpu engine needs files"
        # Faces and lines come several at a time, even from a lone request: one core each.
        cores = 1 if key.part is Part.RECOGNITION else self._cores
        load = self._loads[urgency_of(key.task, key.part)]
        return build_model(key, files, self._open(files.graph, load, cores), self._settings)

    def _open(self, model: Path, load: CoreLoad, cores: int) -> AdaptiveGraph:
        rewritings = chosen_rewritings(self._settings.graph_rewriting)
        form = _find_or_prepare(model, rewritings)
        if form is not None:
            try:
                return AdaptiveGraph(partial(_open_form, form, model), load, cores=cores)
            except LoadFailed as exc:
                log.warning("prepared weights thrown away: folder=%s reason=%s", form, exc)
                prepared_form(model, rewritings).discard(form)
        return AdaptiveGraph(partial(_open_model, model), load, cores=cores)


def _open_form(form: Path, model: Path, threads: int) -> OrtGraph:
    options = session_options(threads)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # it was
    return OrtGraph(form / GRAPH, options=options, weights=model)


def _open_model(model: Path, threads: int) -> OrtGraph:
    return OrtGraph(model, options=session_options(threads))


def _find_or_prepare(model: Path, rewritings: Collection[str]) -> Path | None:
    """The folder of the prepared form, made now if need be.

    None where preparing does not pay or is not possible (small model, read-only or full disk): the
    numbers are the same, only load time and memory differ.

    Raises:
        LoadFailed: the model is torn, or names weights outside its folder.
        OutOfMemory, Busy: the machine is short of memory or files, so that nothing is known.
    """
    try:
        if not worth_preparing(model):
            return None
        form = prepared_form(model, rewritings)
        return form.find() or prepare_in_child(form, rewritings)
    except (NotOnnx, FileNotFoundError) as exc:
        raise LoadFailed(f"ONNX Runtime rejects {model}: {exc}") from exc
    except (OSError, subprocess.SubprocessError) as exc:
        if (short := what_ran_out(exc)) is not None:
            raise short from exc
        reason = _last_words(exc)
        log.warning("weights not prepared, loaded as they are model=%s reason=%s", model, reason)
        return None


def _last_words(exc: Exception) -> str:
    """What went wrong, in the failed process's own words where it had any."""
    words = getattr(exc, "stderr", None) or b""
    text = words.decode(errors="replace") if isinstance(words, bytes) else words
    lines = text.splitlines()
    return lines[-1] if lines else str(exc)
