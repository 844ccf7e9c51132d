"""The composition root: settings → worker app, with its engines and its model store."""

import logging
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

from starlette.types import ASGIApp

from immich_ml_metal.backends.base import Engine
from immich_ml_metal.backends.makers import Surroundings
from immich_ml_metal.backends.selection import FACE_FINDING
from immich_ml_metal.catalog import get_model
from immich_ml_metal.index_guard.guard import IndexGuard
from immich_ml_metal.metrics import Metrics
from immich_ml_metal.models.store import ModelStore
from immich_ml_metal.qualification.checker import Checker, Measure, Tools
from immich_ml_metal.qualification.children import measure
from immich_ml_metal.qualification.plan import Choices, EnginePlan, Machine, this_machine
from immich_ml_metal.qualification.record import Record
from immich_ml_metal.settings import Settings
from immich_ml_metal.state import StateFolder
from immich_ml_metal.types import ModelKey, Part, Task
from immich_ml_metal.worker.guarded_store import GuardedStore
from immich_ml_metal.worker.preload import key_of_setting
from immich_ml_metal.worker.second_try import Requalify
from immich_ml_metal.worker.server import create_app

log = logging.getLogger(__name__)

_MODEL_SETTINGS = MappingProxyType(
    {
        "clip_model": (Task.CLIP, Part.VISUAL),
        "face_model": (Task.FACES, Part.DETECTION),
        "ocr_model": (Task.OCR, Part.DETECTION),
    }
)


def build_app(
    settings: Settings,
    machine: Machine | None = None,
    *,
    start: str = "",
    probe: Measure = measure,
) -> ASGIApp:
    """The worker app as `serve` runs it; says which engines answer and which models are here.

    It starts with what is remembered of its engines and tests none of them. `start` names the start
    of the service that this worker belongs to; `probe` judges an engine that was set aside.

    Raises:
        ConfigError: an engine that was asked for by name cannot be used on this machine, or a
            setting names no official model.
    """
    metrics = Metrics("worker")
    store = ModelStore(settings, on_download=metrics.count_download)
    record = Record(StateFolder(settings.state_folder))
    choices = Choices(settings, machine or this_machine(), record.entries(), store)
    guard = _guard(choices, settings)
    plan = EnginePlan(choices, Surroundings(settings, store.ensure, metrics.count_fallback))
    _report_plan(plan)
    report_models(settings, store)
    guarded = GuardedStore(store, guard, settings, start)
    return create_app(
        settings,
        plan,
        guarded,
        metrics=metrics,
        describe_engines=_describer(plan, record.trouble),
        describe_index=guarded.describe,
        spare=plan.spare,
        requalify=_requalifier(
            choices, Checker(settings, choices.machine, record, store, Tools(probe))
        ),
    )


def _requalifier(choices: Choices, checker: Checker) -> Requalify:
    """Probes an engine that was set aside, in a child, before it is used again."""

    async def is_right_again(key: ModelKey, engine: Engine) -> bool:
        return await checker.is_right_again(key, choices.of(key).candidate)

    return is_right_again


def _guard(choices: Choices, settings: Settings) -> IndexGuard:
    """The guard of this start; faces are found as those in the index were, if it says so."""
    finder = choices.of(choices.configured()[FACE_FINDING]).candidate
    points = "vision" if finder.engine == "vision" else "immich"
    guard = IndexGuard(settings, points, has_vision=choices.could_use_vision())
    choices.hold_faces(guard.held_points())
    return guard


def _describer(plan: EnginePlan, trouble: str) -> Callable[[], dict[str, Any]]:
    """What `/health` says of the engines: the plan, and what they know of themselves."""

    def describe() -> dict[str, Any]:
        details = {
            engine.name: tell()
            for engine in plan.engines()
            if (tell := getattr(engine, "describe", None)) is not None
        }
        told = plan.as_dict()
        if trouble:
            told["warnings"] = [*told["warnings"], f"verdicts are not remembered: {trouble}"]
        return {**told, **details}

    return describe


def _report_plan(plan: EnginePlan) -> None:
    for line in plan.as_table().splitlines():
        log.info("%s", line)
    for warning in plan.warnings:
        log.warning("%s", warning)


def report_models(settings: Settings, store: ModelStore) -> None:
    """Log each configured model as present, or as missing with the way to get it.

    Raises:
        ConfigError: a setting names no official model of its kind.
    """
    for setting, (task, part) in _MODEL_SETTINGS.items():
        spec = get_model(key_of_setting(setting, getattr(settings, setting), task, part).name)
        if spec is None:  # an `open_clip/` name: its engine fetches it, and tells
            continue
        missing = [part for part in spec.parts if store.locate(spec.key(part)) is None]
        if not missing:
            log.info("model is here model=%s", spec.name)
            continue
        size_mib = sum(spec.part_bytes[part] for part in missing) / 2**20
        log.warning(
            "model is missing model=%s parts=%s size_mib=%.0f: it is %s; to get it now, run "
            "immich-ml-metal models pull %s",
            spec.name,
            ",".join(missing),
            size_mib,
            "not fetched while offline" if settings.offline else "fetched when first asked for",
            spec.name,
        )
