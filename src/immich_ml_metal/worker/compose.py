"""The composition root: settings → worker app, with its engines and its model store."""

import logging
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from starlette.types import ASGIApp

from immich_ml_metal.backends.base import Engine
from immich_ml_metal.backends.selection import (
    EnginePlan,
    Probe,
    Slot,
    choose_engines,
    create_engines,
    make_portable,
)
from immich_ml_metal.backends.self_tests import SystemProbe
from immich_ml_metal.catalog import get_model
from immich_ml_metal.index_guard.guard import IndexGuard
from immich_ml_metal.metrics import Metrics
from immich_ml_metal.models.store import ModelStore
from immich_ml_metal.settings import Settings
from immich_ml_metal.types import Part, Task
from immich_ml_metal.worker.guarded_store import GuardedStore
from immich_ml_metal.worker.preload import key_of_setting
from immich_ml_metal.worker.server import create_app

log = logging.getLogger(__name__)

_MODEL_SETTINGS = MappingProxyType(
    {
        "clip_model": (Task.CLIP, Part.VISUAL),
        "face_model": (Task.FACES, Part.DETECTION),
        "ocr_model": (Task.OCR, Part.DETECTION),
    }
)


def build_app(settings: Settings, probe: Probe | None = None, *, start: str = "") -> ASGIApp:
    """The worker app as `serve` runs it; says which engines answer and which models are here.

    `start` names the start of the service that this worker belongs to.

    Raises:
        ConfigError: an engine that was asked for by name cannot be used on this machine, or a
            setting names no official model.
    """
    plan = choose_engines(settings, probe or SystemProbe())
    _report_plan(plan)
    metrics = Metrics("worker")
    count = metrics.fallbacks.labels
    store = ModelStore(settings, on_download=metrics.count_download)
    engines = create_engines(
        plan, settings, files_of=store.ensure, on_fallback=lambda reason: count(reason).inc()
    )
    report_models(settings, store)
    guard = _guard(plan, settings)
    guarded = GuardedStore(store, guard, settings, start)
    return create_app(
        settings,
        _keep_points(plan.bind(engines), guard, engines, settings),
        guarded,
        metrics=metrics,
        describe_engines=_describer(plan, engines),
        describe_index=guarded.describe,
        spare=lambda: engines.get("cpu") or make_portable(settings),
    )


def _guard(plan: EnginePlan, settings: Settings) -> IndexGuard:
    detector = plan.engine_of(Task.FACES, Part.DETECTION)
    points = "vision" if detector == "vision" else "immich"
    return IndexGuard(settings, points, has_vision="vision" in plan.names)


def _keep_points(
    table: dict[Slot, Engine],
    guard: IndexGuard,
    engines: Mapping[str, Engine],
    settings: Settings,
) -> dict[Slot, Engine]:
    """Let faces be found as those in the index were, until the user accepts the change."""
    kept = guard.held_points()
    if not kept:
        return table
    official = engines.get("mlx") or engines.get("cpu")
    finder = engines["vision"] if kept == "vision" else official or make_portable(settings)
    return {**table, (Task.FACES, Part.DETECTION): finder}


def _describer(plan: EnginePlan, engines: Mapping[str, Engine]) -> Callable[[], dict[str, Any]]:
    """What `/health` says of the engines: the plan, and what they know of themselves."""

    def describe() -> dict[str, Any]:
        details = {
            name: tell()
            for name, engine in engines.items()
            if (tell := getattr(engine, "describe", None)) is not None
        }
        return {**plan.as_dict(), **details}

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
