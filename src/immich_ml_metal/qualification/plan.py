"""Who answers what in a worker: made from what is remembered, once, and kept while it lives.

Runs no self-test: a worker starts as fast with a slow engine as with a fast one.
"""

import functools
import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from immich_ml_metal.backends.base import Engine, in_format
from immich_ml_metal.backends.makers import MAKERS, Maker, Surroundings
from immich_ml_metal.backends.selection import (
    FACE_FINDING,
    REFERENCE,
    TEXT_READING,
    VISION,
    Candidate,
    Platform,
    Rule,
    rule_for,
    this_platform,
)
from immich_ml_metal.catalog import key_of_setting, model_setting
from immich_ml_metal.errors import ConfigError, ServiceError, UnknownModel
from immich_ml_metal.index_guard.guard import IndexGuard
from immich_ml_metal.onnx_files.derived import stamp_of
from immich_ml_metal.qualification.choice import Choice, decide
from immich_ml_metal.qualification.environment import Environment, settings_facts
from immich_ml_metal.qualification.record import Entry, Record, name_of
from immich_ml_metal.settings import Settings
from immich_ml_metal.state import StateFolder
from immich_ml_metal.types import SLOTS, ModelFiles, ModelKey, Part, Slot, Task

log = logging.getLogger(__name__)

CHANGED = "changed"  # in place of the digest of files that are others than those judged
NO_FILES = frozenset({"vision", "open_clip"})  # engines whose numbers no file of Immich's decides


class Locator(Protocol):
    """The part of the model store that knows where files are."""

    def locate(self, key: ModelKey) -> ModelFiles | None:
        """Where a half lies; None when it is not here."""
        ...


class ServedFiles:
    """The files that answer: those of the settings, or those that the index guard keeps serving."""

    def __init__(self, store: Locator, guard: IndexGuard | None = None) -> None:
        self._store = store
        self.guard = guard  # None until it is known

    def locate(self, key: ModelKey) -> ModelFiles | None:
        """Where a half lies; None when it is not here."""
        find = self._store.locate
        return find(key) if self.guard is None else self.guard.locate(key, find)


@dataclass(frozen=True, slots=True)
class Machine:
    """What choices are made for, and with what in mind."""

    platform: Platform
    environment: Environment
    makers: Mapping[str, Maker]


def this_machine() -> Machine:
    """The machine that this process runs on, with the real engines."""
    return Machine(this_platform(), Environment(), MAKERS)


class Choices:
    """Which candidate answers which model, by the settings and what is remembered."""

    def __init__(
        self,
        settings: Settings,
        machine: Machine,
        record: Record,
        store: Locator,
    ) -> None:
        self.settings = settings
        self.machine = machine
        self.record = record
        self.store = store
        self._entries = record.entries()
        self._made: dict[ModelKey, Choice] = {}
        self._held = ""

    def rule(self, slot: Slot) -> Rule:
        """What the settings allow, and for faces what the index was made with."""
        rule = rule_for(slot, self.settings, self.machine.platform)
        if slot != FACE_FINDING or self._held in ("", rule.candidates[0].family):
            return rule
        kept = [one for one in rule.candidates if one.family == self._held]
        other = VISION if self._held == VISION.family else REFERENCE
        return Rule(tuple(kept) or (other,), f"{rule.why}, but as the index was made")

    def hold_faces(self, family: str) -> None:
        """Find faces as those in the index were (`immich` or `vision`); empty lets them go."""
        self._held = family
        for key in [key for key in self._made if (key.task, key.part) == FACE_FINDING]:
            del self._made[key]

    def could_use_vision(self) -> bool:
        """Whether Apple Vision could find faces here, as far as is known without asking it."""
        judged = self.entry(self.configured()[FACE_FINDING]).judged.get(VISION)
        is_here = self.machine.platform.is_apple_silicon or (
            VISION in self.rule(FACE_FINDING).candidates
        )
        return is_here and (judged is None or judged.verdict.is_usable)

    def entry(self, key: ModelKey) -> Entry:
        """What is remembered of a model."""
        return self._entries.get(name_of(key), Entry())

    def of(self, key: ModelKey) -> Choice:
        """Who answers a model; the same for as long as this object lives."""
        if key not in self._made:
            slot, entry = (key.task, key.part), self.entry(key)
            self._made[key] = decide(slot, self.rule(slot), entry, self.facts(key, entry))
        return self._made[key]

    def wanted(self, key: ModelKey) -> Candidate:
        """Who would answer a model if nobody had before."""
        slot, entry = (key.task, key.part), replace(self.entry(key), chosen=None)
        return decide(slot, self.rule(slot), entry, self.facts(key, entry)).candidate

    def picture_ms(self) -> dict[str, float]:
        """What was measured of those search models that are chosen, per picture, by name."""
        pictures = name_of(ModelKey(Task.CLIP, Part.VISUAL, ""))
        found = {}
        for name, entry in self._entries.items():
            judged = entry.judged.get(entry.chosen or REFERENCE)
            if judged is not None and name.startswith(pictures):
                figures = judged.verdict.figures
                if (ms := figures.batch_ms or figures.alone_ms) is not None:
                    found[name.removeprefix(pictures)] = ms
        return found

    @property
    def made(self) -> Mapping[ModelKey, Choice]:
        """Every choice so far."""
        return self._made

    def override(self, key: ModelKey, choice: Choice) -> None:
        """Choose otherwise: the engine cannot even be made."""
        self._made[key] = choice

    def facts(self, key: ModelKey, entry: Entry) -> Callable[[str], Mapping[str, str]]:
        """What verdicts on a model depend on now, by engine."""

        @functools.cache
        def model() -> str:
            try:
                files = self.store.locate(key)
                same = files is not None and stamp_of(files.graph) == entry.stamp
            except (UnknownModel, OSError, ValueError):
                same = False
            return entry.digest if same else CHANGED

        def facts(engine: str) -> Mapping[str, str]:
            set_to = settings_facts(engine, self.settings)
            known = {**self.machine.environment.facts_for(engine), **set_to}
            return known if engine in NO_FILES else {**known, "model": model()}

        return facts

    @property
    def pending(self) -> list[ModelKey]:
        """Models in use that wait for a verdict."""
        return [key for key, choice in self._made.items() if choice.is_pending]

    def configured(self) -> dict[Slot, ModelKey]:
        """The model of each part of each task, by the settings.

        Raises:
            ConfigError: a setting names no official model of its kind.
        """
        named = {slot: model_setting(slot[0]) for slot in SLOTS}
        return {
            slot: key_of_setting(setting, getattr(self.settings, setting), slot)
            for slot, setting in named.items()
        }

    def reads_while_finding(self, key: ModelKey) -> bool:
        """Whether this half reads text that Apple Vision has read already."""
        if (key.task, key.part) != TEXT_READING:
            return False
        return self.of(replace(key, part=Part.DETECTION)).candidate.engine == "vision"

    def answering(self, key: ModelKey) -> Choice:
        """Who gives the answers of this half: for text that is read while found, the finder."""
        is_read = self.reads_while_finding(key)
        return self.of(replace(key, part=Part.DETECTION) if is_read else key)


def remembered_choices(
    settings: Settings, store: Locator, machine: Machine | None = None
) -> Choices:
    """As the service makes them: about the files and with the faces that the index guard keeps."""
    guard = IndexGuard(settings)
    record = Record(StateFolder(settings.state_folder))
    choices = Choices(settings, machine or this_machine(), record, ServedFiles(store, guard))
    choices.hold_faces(guard.held_points())
    return choices


class EnginePlan:
    """The engines of a worker (`EngineTable`). Event loop only."""

    def __init__(self, choices: Choices, surroundings: Surroundings) -> None:
        """Make the engines of the configured models.

        Raises:
            ConfigError: an engine that was asked for by name cannot be used here; or not even the
                portable one can.
        """
        self.choices = choices
        self._surroundings = surroundings
        self._engines: dict[str, Engine] = {}
        self._chosen: dict[ModelKey, Engine] = {}
        self._configured = choices.configured()
        for key in self._configured.values():
            if self.serves(key):
                self._engine(key)

    def serves(self, key: ModelKey) -> bool:
        """Whether an engine is set for this half; Apple Vision reads text while detecting it."""
        return not self.choices.reads_while_finding(key)

    def choose(self, key: ModelKey) -> Engine:
        """The engine of a model, in the number format of its choice.

        Raises:
            LoadFailed: the engine does not have that format.
        """
        if key not in self._chosen:
            engine = self._engine(key)  # may change the choice
            choice = self.choices.of(key)
            self._chosen[key] = in_format(engine, choice.candidate.number_format)
            log.info("engine of model=%s is %s: %s", key, choice.candidate, choice.reason)
        return self._chosen[key]

    def spare(self) -> Engine:
        """The engine that runs everywhere, for what another one has no answer to."""
        return self._make(REFERENCE, is_explicit=False)

    def names(self) -> dict[Slot, str]:
        """The engine of each part of each task, for the configured models."""
        return {
            slot: self.choices.of(key).candidate.engine
            for slot, key in self._configured.items()
            if self.serves(key)
        }

    def engines(self) -> Collection[Engine]:
        """Every engine that was made so far."""
        return self._engines.values()

    @property
    def warnings(self) -> list[str]:
        """What the operator should know, once each."""
        keys = dict.fromkeys([*self._configured.values(), *self.choices.made])
        found = (self.choices.of(key).warning for key in keys)
        return list(dict.fromkeys(warning for warning in found if warning))

    def _engine(self, key: ModelKey) -> Engine:
        choice = self.choices.of(key)
        try:
            return self._make(choice.candidate, is_explicit=self._is_explicit(key))
        except (ImportError, ServiceError) as exc:
            reason = _words(exc)
            if self._is_explicit(key) or choice.candidate == REFERENCE:
                raise ConfigError(
                    f"{choice.candidate.engine}, {choice.reason}, cannot be used here: {reason}"
                ) from exc
            warning = f"{choice.candidate.engine} is not used: {reason}"
            fallback = Choice(REFERENCE, f"{choice.reason}, unavailable", True, warning)
            self.choices.override(key, fallback)
            return self._make(REFERENCE, is_explicit=False)

    def _make(self, candidate: Candidate, *, is_explicit: bool) -> Engine:
        if candidate.engine not in self._engines:
            given = replace(self._surroundings, is_explicit=is_explicit)
            self._engines[candidate.engine] = self.choices.machine.makers[candidate.engine](given)
        return self._engines[candidate.engine]

    def _is_explicit(self, key: ModelKey) -> bool:
        return self.choices.rule((key.task, key.part)).is_explicit

    # -- for people --------------------------------------------------------------------------------

    def as_dict(self) -> dict[str, Any]:
        """Render for `/health`. Any: a tree of plain values."""
        return {
            "platform": str(self.choices.machine.platform),
            "tasks": {
                f"{task}/{part}": self._describe(key)
                for (task, part), key in self._configured.items()
            },
            "pending": [name_of(key) for key in self.choices.pending],
            "serving": {
                name_of(key): str(choice.candidate) for key, choice in self.choices.made.items()
            },
            "warnings": self.warnings,
        }

    def _describe(self, key: ModelKey) -> dict[str, Any]:
        choice = self.choices.answering(key)
        return {
            "model": key.name,
            "engine": choice.candidate.engine,
            "number_format": choice.candidate.number_format,
            "reason": choice.reason,
        }

    def as_table(self) -> str:
        """Render for the terminal: a row per part, then the warnings."""
        rows = [("task", "part", "engine", "numbers", "why")]
        for slot, key in self._configured.items():
            told = self._describe(key)
            rows.append((*slot, told["engine"], told["number_format"], told["reason"]))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = [
            "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[4]])
            for row in rows
        ]
        warnings = [f"warning: {warning}" for warning in self.warnings]
        platform = self.choices.machine.platform
        return "\n".join([f"engines on {platform}", *lines, *warnings])


def _words(exc: Exception) -> str:
    return f"{exc.name or exc} cannot be imported" if isinstance(exc, ImportError) else str(exc)
