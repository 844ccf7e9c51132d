"""Which engine answers which task: decided once at start, by rules and real self-tests.

An explicit choice that cannot be honoured stops the start. `auto` goes on to the next engine and
says so in a warning that stays in the plan, which is printed, is in `/health`, and never changes.
"""

import importlib
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from immich_ml_metal.backends.base import Engine
from immich_ml_metal.errors import ConfigError
from immich_ml_metal.settings import Settings, env_names
from immich_ml_metal.types import ModelFiles, ModelKey, Part, Task

Slot = tuple[Task, Part]

# Per part of a task: the setting that decides, and what `auto` tries in turn on Apple Silicon.
SETTINGS: Mapping[Slot, str] = {
    (Task.CLIP, Part.VISUAL): "clip_engine",
    (Task.CLIP, Part.TEXTUAL): "clip_engine",
    (Task.FACES, Part.DETECTION): "face_detection_engine",
    (Task.FACES, Part.RECOGNITION): "face_recognition_engine",
    (Task.OCR, Part.DETECTION): "ocr_engine",
    (Task.OCR, Part.RECOGNITION): "ocr_engine",
}
NATIVE: Mapping[str, tuple[str, ...]] = {
    "clip_engine": ("mlx", "cpu"),
    "face_detection_engine": ("vision", "mlx", "cpu"),
    "face_recognition_engine": ("coreml", "mlx", "cpu"),
    "ocr_engine": ("vision", "mlx", "cpu"),
}
EXACT = ("mlx", "cpu")
PORTABLE = ("cpu",)


@dataclass(frozen=True, slots=True)
class Platform:
    """The machine, in `platform`'s words: Darwin and arm64, x86_64, Linux."""

    system: str
    machine: str

    @property
    def is_apple_silicon(self) -> bool:
        """Whether there is a Metal GPU and a Neural Engine to use."""
        return self.system == "Darwin" and self.machine == "arm64"

    def __str__(self) -> str:
        if self.system == "Darwin":
            return "Apple Silicon" if self.is_apple_silicon else f"Mac ({self.machine})"
        return f"{self.system} ({self.machine})"


def this_platform() -> Platform:
    """The machine as the interpreter says: under Rosetta, Apple Silicon counts as an Intel Mac."""
    return Platform(platform.system(), platform.machine())


class Probe(Protocol):
    """What this machine is and can do."""

    @property
    def platform(self) -> Platform:
        """The machine."""
        ...

    def check(self, engine: str) -> str | None:
        """Import `engine` and let it do a small real piece of work.

        Returns:
            Why it cannot be used here, or None when it works.
        """
        ...


@dataclass(frozen=True, slots=True)
class Choice:
    """One part of one task: its engine, why that one, and what the operator should know."""

    task: Task
    part: Part
    engine: str
    reason: str
    is_explicit: bool = False
    warning: str | None = None


@dataclass(frozen=True, slots=True)
class EnginePlan:
    """The choices of a start, in the order of the tasks."""

    platform: Platform
    choices: tuple[Choice, ...]

    def engine_of(self, task: Task, part: Part) -> str:
        """Name the engine that answers this part."""
        return self.choice_of(task, part).engine

    def choice_of(self, task: Task, part: Part) -> Choice:
        """Find the choice for this part."""
        return next(choice for choice in self.choices if (choice.task, choice.part) == (task, part))

    @property
    def names(self) -> tuple[str, ...]:
        """Every engine in use, once."""
        return tuple(dict.fromkeys(choice.engine for choice in self.choices))

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the operator should know, once each."""
        warnings = (choice.warning for choice in self.choices if choice.warning)
        return tuple(dict.fromkeys(warnings))

    def bind(self, engines: Mapping[str, Engine]) -> dict[Slot, Engine]:
        """Give the table that the pool works from.

        Text recognition is left out where Vision detects: it reads in the same call.
        """
        return {
            (choice.task, choice.part): engines[choice.engine]
            for choice in self.choices
            if not (choice.engine == "vision" and (choice.task, choice.part) == _TEXT_READING)
        }

    def as_dict(self) -> dict[str, Any]:
        """Render for `/health`."""
        return {
            "platform": str(self.platform),
            "tasks": {
                f"{choice.task}/{choice.part}": {"engine": choice.engine, "reason": choice.reason}
                for choice in self.choices
            },
            "warnings": list(self.warnings),
        }

    def as_table(self) -> str:
        """Render for the terminal: a row per part, then the warnings."""
        rows = [("task", "part", "engine", "why")]
        rows += [(one.task, one.part, one.engine, one.reason) for one in self.choices]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = [
            "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]])
            for row in rows
        ]
        warnings = [f"warning: {warning}" for warning in self.warnings]
        return "\n".join([f"engines on {self.platform}", *lines, *warnings])


_TEXT_READING: Slot = (Task.OCR, Part.RECOGNITION)


def choose_engines(settings: Settings, probe: Probe) -> EnginePlan:
    """Decide every part; each engine that is considered is tested once.

    Raises:
        ConfigError: an engine was asked for by name and cannot be used here, with the reason; or
            not even the portable engine works.
    """
    tested: dict[str, str | None] = {}

    def check(engine: str) -> str | None:
        if engine not in tested:
            tested[engine] = probe.check(engine)
        return tested[engine]

    choices = [
        _choose(task, part, setting, settings, probe.platform, check)
        for (task, part), setting in SETTINGS.items()
    ]
    return EnginePlan(probe.platform, tuple(choices))


@dataclass(frozen=True, slots=True)
class _Willing:
    """A machine on which every engine works: it loads and tests nothing."""

    platform: Platform

    def check(self, engine: str) -> str | None:
        return None


def plan_untested(settings: Settings, platform: Platform) -> EnginePlan:
    """Give what a start would choose here if every engine passed its self-test; imports none."""
    return choose_engines(settings, _Willing(platform))


def _choose(
    task: Task,
    part: Part,
    setting: str,
    settings: Settings,
    platform: Platform,
    check: Callable[[str], str | None],
) -> Choice:
    wanted = getattr(settings, setting)
    if wanted != "auto":
        return _honour(task, part, setting, wanted, check)
    order, why = _order(setting, settings, platform)
    skipped: list[str] = []
    for engine in order:
        problem = check(engine)
        if problem is None:
            reason = f"{why}, {' and '.join(skipped)} unavailable" if skipped else why
            warnings = [f"{name} is not used for {task}: {check(name)}" for name in skipped]
            return Choice(task, part, engine, reason, warning="; ".join(warnings) or None)
        skipped.append(engine)
    raise ConfigError(f"no engine can serve {task} {part}: {check(order[-1])}")


def _honour(
    task: Task, part: Part, setting: str, wanted: str, check: Callable[[str], str | None]
) -> Choice:
    name = env_names(Settings.model_fields[setting])[0]
    problem = check(wanted)
    if problem is not None:
        raise ConfigError(f"{name} = {wanted} cannot be honoured here: {problem}")
    return Choice(task, part, wanted, f"asked for by {name}", is_explicit=True)


def _order(setting: str, settings: Settings, platform: Platform) -> tuple[tuple[str, ...], str]:
    """What to try in turn, and the rule in words."""
    if not platform.is_apple_silicon:
        return PORTABLE, "portable default"
    if settings.profile == "exact":
        return EXACT, "profile exact"
    order = NATIVE[setting]
    if not settings.use_coreml:
        order = tuple(engine for engine in order if engine != "coreml")
    return order, "profile native"


# -- making the engines ----------------------------------------------------------------------------

FilesOf = Callable[[ModelKey], ModelFiles]


def _no_files(key: ModelKey) -> ModelFiles:
    raise ConfigError(f"no model store was given to fetch {key} from")


def create_engines(
    plan: EnginePlan,
    settings: Settings,
    *,
    files_of: FilesOf = _no_files,
    on_fallback: Callable[[str], None] = lambda reason: None,
) -> Mapping[str, Engine]:
    """Make each engine of the plan once; only their modules are imported.

    Args:
        plan: what was chosen.
        settings: how the engines are to work.
        files_of: finds (or fetches) an official model's files, for what Apple Vision cannot answer.
        on_fallback: is told the reason each time something runs elsewhere than planned.

    Raises:
        ConfigError: a setting of an engine is malformed.
    """
    makers: dict[str, Callable[[], Engine]] = {
        "cpu": lambda: _class("ort.engine", "OrtEngine")(settings),
        "mlx": lambda: _class("mlx", "MlxEngine")(settings),
        "coreml": lambda: _class("coreml.engine", "create_coreml")(
            settings, is_explicit=_is_explicit(plan), on_fallback=on_fallback
        ),
        "vision": lambda: _class("vision.setup", "create_vision")(
            settings, files_of=files_of, on_fallback=on_fallback
        ),
        "open_clip": lambda: _class("open_clip", "create_open_clip")(settings),
    }
    return {name: makers[name]() for name in plan.names}


def make_portable(settings: Settings) -> Engine:
    """The engine that runs everywhere: the spare one where the plan has it not."""
    engine: Engine = _class("ort.engine", "OrtEngine")(settings)
    return engine


def _class(module: str, name: str) -> Any:
    """Import a maker from a sibling only now: its module loads a hardware library."""
    return getattr(importlib.import_module(f"immich_ml_metal.backends.{module}"), name)


def _is_explicit(plan: EnginePlan) -> bool:
    """Whether Core ML was asked for by name: then a refusal is an error, not a fallback."""
    return any(choice.engine == "coreml" and choice.is_explicit for choice in plan.choices)
