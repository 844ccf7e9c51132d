"""The composition root: settings → worker app, with its engines and its model store."""

import logging
from collections.abc import Callable
from typing import Any

from starlette.types import ASGIApp

from immich_ml_metal.backends.makers import Surroundings
from immich_ml_metal.backends.selection import FACE_FINDING, Candidate
from immich_ml_metal.catalog import get_model
from immich_ml_metal.index_guard.guard import IndexGuard
from immich_ml_metal.metrics import Metrics
from immich_ml_metal.models.store import ModelStore
from immich_ml_metal.qualification.checker import Checker, Measure, Tools
from immich_ml_metal.qualification.children import measure
from immich_ml_metal.qualification.plan import (
    Choices,
    EnginePlan,
    Machine,
    ServedFiles,
    remembered_choices,
    this_machine,
)
from immich_ml_metal.qualification.record import Record
from immich_ml_metal.setting_kinds import format_bytes
from immich_ml_metal.settings import Settings
from immich_ml_metal.state import StateFolder
from immich_ml_metal.worker.guarded_store import GuardedStore
from immich_ml_metal.worker.preload import preload_keys
from immich_ml_metal.worker.server import create_app

log = logging.getLogger(__name__)


def build_app(
    settings: Settings, machine: Machine | None = None, *, start: str = "", probe: Measure = measure
) -> ASGIApp:
    """The worker app as `serve` runs it; says which engines answer and which models are here.

    It tests none of them. `start` names the start of the service that this worker belongs to;
    `probe` judges an engine that was set aside.

    Raises:
        ConfigError: an engine that was asked for cannot be used here, or a setting names no model.
    """
    metrics = Metrics("worker")
    store = ModelStore(settings, on_download=metrics.count_download)
    choices, guard = _choices(settings, machine or this_machine(), store)
    plan = EnginePlan(choices, Surroundings(settings, store.ensure, metrics.count_fallback))
    _report(plan, store)
    guarded = GuardedStore(store, guard, settings, start)
    return create_app(
        settings,
        plan,
        guarded,
        metrics=metrics,
        describe_engines=_describer(plan, store),
        describe_index=guarded.describe,
        spare=plan.spare,
        requalify=Checker(choices, Tools(probe)).is_right_again,
    )


def check_start(settings: Settings) -> None:
    """Refuse what the worker of such a start would refuse; start and write nothing.

    Raises:
        ConfigError: as `build_app`.
    """
    store = ModelStore(settings)
    choices = remembered_choices(settings, store)
    EnginePlan(choices, Surroundings(settings, store.ensure, lambda *_: None))
    preload_keys(settings)


def _choices(settings: Settings, machine: Machine, store: ModelStore) -> tuple[Choices, IndexGuard]:
    """Who answers in this start, and its guard: files and faces are those that it keeps."""
    files = ServedFiles(store)
    record = Record(StateFolder(settings.state_folder))
    choices = Choices(settings, machine, record, files)
    key = choices.configured()[FACE_FINDING]

    def guard_for(finder: Candidate) -> IndexGuard:
        points = "vision" if finder.engine == "vision" else "immich"
        return IndexGuard(settings, points, has_vision=choices.could_use_vision())

    files.guard = guard_for(choices.wanted(key))
    choices.hold_faces(held := files.guard.held_points())
    if not held:
        files.guard = guard_for(choices.of(key).candidate)
    return choices, files.guard


def _describer(plan: EnginePlan, store: ModelStore) -> Callable[[], dict[str, Any]]:
    """What `/health` says of the engines: the plan, and what they know of themselves."""
    troubles = store.shelf.unreadable()
    if trouble := plan.choices.record.trouble:
        troubles = [f"verdicts are not remembered: {trouble}", *troubles]

    def describe() -> dict[str, Any]:
        details = {
            engine.name: tell()
            for engine in plan.engines()
            if (tell := getattr(engine, "describe", None)) is not None
        }
        told = plan.as_dict()
        told["warnings"] = [*told["warnings"], *troubles]
        return {**told, **details}

    return describe


def _report(plan: EnginePlan, store: ModelStore) -> None:
    for line in plan.as_table().splitlines():
        log.info("%s", line)
    for warning in plan.warnings:
        log.warning("%s", warning)
    for trouble in store.shelf.unreadable():
        log.warning("a folder of models cannot be read, the others are served: %s", trouble)
    _report_models(plan.choices)


def _report_models(choices: Choices) -> None:
    """Log each configured model as present, or as missing with the way to get it."""
    settings = choices.settings
    for name in dict.fromkeys(key.name for key in choices.configured().values()):
        spec = get_model(name)
        if spec is None:  # an `open_clip/` name: its engine fetches it, and tells
            continue
        missing = [part for part in spec.parts if choices.store.locate(spec.key(part)) is None]
        if not missing:
            log.info("model is here model=%s", spec.name)
            continue
        size = format_bytes(sum(spec.part_bytes[part] for part in missing))
        log.warning(
            "model is missing model=%s parts=%s size=%s: it is %s; to get it now, run "
            "immich-ml-metal models pull %s",
            spec.name,
            ",".join(missing),
            size,
            "not fetched while offline" if settings.offline else "fetched when first asked for",
            spec.name,
        )
