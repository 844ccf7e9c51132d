"""The check that the service makes by itself: is the rule's first choice right on this machine?

One child process at a time, at low priority, and only while there is memory for it. Whatever it
finds is remembered; the worker takes it up at its next start. Nobody waits for it.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Protocol

import psutil

from immich_ml_metal.backends.selection import REFERENCE, Candidate
from immich_ml_metal.errors import UnknownModel
from immich_ml_metal.onnx_files.derived import digest_of, stamp_of
from immich_ml_metal.onnx_files.references import weight_bytes
from immich_ml_metal.qualification.choice import Choice, decide
from immich_ml_metal.qualification.order import CHECK, Order
from immich_ml_metal.qualification.plan import NO_FILES, Choices
from immich_ml_metal.qualification.record import Entry, name_of
from immich_ml_metal.qualification.verdict import Judged, Outcome, Verdict
from immich_ml_metal.setting_kinds import format_bytes
from immich_ml_metal.types import ModelKey

log = logging.getLogger(__name__)

# How long one probe of a check may take. Vision's first request after an update of macOS has taken
# up to 201 s in public reports, with 15 to 58 s the rule; compiling for the Neural Engine minutes.
LIMITS_S: Mapping[str, float] = MappingProxyType({"vision": 130.0, "mlx": 300.0, "coreml": 900.0})
# A probe needs the candidate's weights and, after it, the reference's; converting holds both forms.
_WEIGHT_FACTOR = 2.5
_LIBRARIES_BYTES = 500_000_000
# And this much of the machine must stay free beside it, so that nothing else is swapped out.
_SHARE_LEFT_FREE = 0.1
# A hang may be a cold cache of the system's, an end by a signal the kernel's want of memory: such a
# probe is run once more before it is believed.
_ONCE_MORE = {Outcome.HUNG, Outcome.CRASHED}

Measure = Callable[[Order], Awaitable[Verdict]]


class Memory(Protocol):
    """What is free of the machine's memory, in bytes."""

    def __call__(self) -> tuple[int, int]:
        """Available, and total."""
        ...


def machine_memory() -> tuple[int, int]:
    """Available and total bytes of this machine."""
    memory = psutil.virtual_memory()
    return int(memory.available), int(memory.total)


@dataclass(frozen=True, slots=True)
class Tools:
    """What a checker works with: the probe, and the memory it must leave alone."""

    measure: Measure
    memory: Memory = machine_memory
    limits_s: Mapping[str, float] = field(default_factory=lambda: LIMITS_S)


class Checker:
    """Judges models one after the other; nobody waits for it. Blocks where it reads files."""

    def __init__(self, choices: Choices, tools: Tools) -> None:
        self._choices = choices
        self._tools = tools

    async def settle(self, key: ModelKey) -> Choice | None:
        """Measure what is wanted of a model and choose; None where it cannot be done now.

        None means that its files are not here or are being replaced, or that memory is short.
        """
        slot = (key.task, key.part)
        rule = self._choices.rule(slot)
        entry = current_entry(self._choices, key, rule.candidates)
        if entry is None:
            return None
        while (choice := decide(slot, rule, entry, self._choices.facts(key, entry))).is_pending:
            candidate = next_candidate(rule.candidates, entry, self._choices.facts(key, entry))
            if candidate is None:
                break
            if not self._has_room(key, candidate):
                return None
            judged = await judge_files(
                self._choices, key, entry, candidate, partial(self._measure, key), CHECK
            )
            if judged is None:
                return None
            # Remembered at once: what was found is not found again after a crash of ours.
            entry = keep(self._choices, key, entry, judged)
        choose(self._choices, key, choice)
        log.info("engine chosen model=%s engine=%s why=%s", key, choice.candidate, choice.reason)
        return choice

    async def is_right_again(self, key: ModelKey) -> bool:
        """Whether who was chosen for a model, and failed at work, passes a probe.

        Where memory is short it counts as right: trying it costs less than swapping. Its files are
        looked at on a thread: whoever asks answers requests meanwhile. Remembers nothing.
        """
        candidate = self._choices.of(key).candidate
        if not await asyncio.to_thread(self._has_room, key, candidate):
            return True
        return (await self._measure(key, candidate)).is_usable

    def _has_room(self, key: ModelKey, candidate: Candidate) -> bool:
        """The memory gate: whether a probe fits without anything being swapped out for it."""
        available, total = self._tools.memory()
        files = None if candidate.engine in NO_FILES else self._choices.store.locate(key)
        weights = weight_bytes(files.graph) if files is not None else 0
        needed = int(weights * _WEIGHT_FACTOR) + _LIBRARIES_BYTES
        has_room = available - needed >= total * _SHARE_LEFT_FREE
        if not has_room:
            log.info(
                "a check waits for memory model=%s needed=%s available=%s",
                *(key, format_bytes(needed), format_bytes(available)),
            )
        return has_room

    async def _measure(self, key: ModelKey, candidate: Candidate) -> Verdict:
        """One verdict; an end without words is asked for once more."""
        limit_s = limit_of(candidate, self._tools.limits_s)
        settings_json = self._choices.settings.model_dump_json()
        order = Order(settings_json, key, candidate, CHECK, limit_s)
        log.info("checking an engine model=%s engine=%s", key, candidate)
        verdict = await self._tools.measure(order)
        if verdict.outcome in _ONCE_MORE:
            log.info("checking again model=%s engine=%s after=%s", key, candidate, verdict)
            verdict = await self._tools.measure(order)
        log.info("checked model=%s engine=%s verdict=%s", key, candidate, verdict)
        return verdict


def next_candidate(
    order: Sequence[Candidate], entry: Entry, facts: Callable[[str], Mapping[str, str]]
) -> Candidate | None:
    """The first in order without a verdict that holds now; the reference needs none."""
    for candidate in order:
        judged = entry.judged.get(candidate)
        is_fresh = judged is not None and judged.facts == facts(candidate.engine)
        if candidate != REFERENCE and not is_fresh:
            return candidate
    return None


def limit_of(candidate: Candidate, limits_s: Mapping[str, float] = LIMITS_S) -> float:
    """Seconds that a probe of a candidate may take; the longest for one that has no own limit."""
    return limits_s.get(candidate.engine, max(limits_s.values()))


def current_entry(choices: Choices, key: ModelKey, candidates: Sequence[Candidate]) -> Entry | None:
    """The entry of a model, about the files that are here now; None where none are and some must.

    Verdicts about other weights hold no longer: the digest that they depend on is another.
    """
    record = choices.record
    entry = record.entries().get(name_of(key), Entry())
    try:
        files = choices.store.locate(key)
        if files is None:
            return entry if candidates[0].engine in NO_FILES else None
        stamp = stamp_of(files.graph)
        if stamp == entry.stamp:
            return entry
        digest = digest_of(files.graph)
    except (OSError, UnknownModel, ValueError):
        return None
    record.change(key, lambda old: replace(old, stamp=stamp, digest=digest))
    return replace(entry, stamp=stamp, digest=digest)


async def judge_files(
    choices: Choices,
    key: ModelKey,
    entry: Entry,
    candidate: Candidate,
    measure: Callable[[Candidate], Awaitable[Verdict]],
    depth: str,
) -> Judged | None:
    """Measure a candidate; None where the files were replaced meanwhile: which were measured?"""
    before = choices.facts(key, entry)(candidate.engine)
    verdict = await measure(candidate)
    after = choices.facts(key, entry)(candidate.engine)
    return Judged(candidate, verdict, after, depth) if before == after else None


def keep(choices: Choices, key: ModelKey, entry: Entry, judged: Judged) -> Entry:
    """Remember a verdict; the entry with it is right even where nothing can be remembered."""
    choices.record.change(key, lambda old: old.with_verdict(judged))
    return entry.with_verdict(judged)


def choose(choices: Choices, key: ModelKey, choice: Choice) -> None:
    """Remember who answers."""
    under = choices.rule((key.task, key.part)).why
    who = choice.candidate
    choices.record.change(key, lambda old: replace(old, chosen=who, chosen_under=under))
