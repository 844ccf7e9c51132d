"""The comparison of all candidates with their speeds: by the user's wish, on an idle machine.

Every verdict is remembered as it comes, so that what was measured before an interruption stays.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from immich_ml_metal.backends.selection import LADDERS, OWN_FORMAT, REFERENCE, Candidate
from immich_ml_metal.qualification.checker import (
    Measure,
    choose,
    current_entry,
    judge_files,
    keep,
    limit_of,
)
from immich_ml_metal.qualification.choice import Choice, decide
from immich_ml_metal.qualification.order import COMPARISON, Order
from immich_ml_metal.qualification.plan import Choices
from immich_ml_metal.qualification.record import Entry
from immich_ml_metal.qualification.verdict import Judged
from immich_ml_metal.types import ModelKey


@dataclass(frozen=True, slots=True)
class Row:
    """One candidate with one half of a model; `is_new` when it was measured just now."""

    key: ModelKey
    judged: Judged
    is_new: bool


@dataclass(frozen=True, slots=True)
class Compared:
    """All of one half of a model, and who is chosen by it."""

    key: ModelKey
    rows: tuple[Row, ...]
    choice: Choice


class Comparison:
    """Compares the candidates of one model after the other."""

    def __init__(
        self,
        choices: Choices,
        measure: Measure,
        *,
        engines: Sequence[str] = (),
        again: bool = False,
    ) -> None:
        """Compare what the settings allow, and every format of `engines` beside it.

        `again` measures also what is known already.
        """
        self._choices = choices
        self._measure = measure
        self._engines = engines
        self._again = again

    def candidates(self, key: ModelKey) -> tuple[Candidate, ...]:
        """Everything that is compared for one half of a model; the reference comes last."""
        allowed = self._choices.rule((key.task, key.part)).candidates
        named = (one for engine in self._engines for one in formats_of(engine))
        found = dict.fromkeys([*allowed, *named])
        found.pop(REFERENCE, None)
        return (*found, REFERENCE)

    async def compare(self, key: ModelKey, on_step: Callable[[Candidate], None]) -> Compared | None:
        """Measure and choose; None where the model's files are not here, or are being replaced.

        Args:
            key: which half.
            on_step: is told of each candidate before it is measured.
        """
        entry = current_entry(self._choices, key, self.candidates(key))
        if entry is None:
            return None
        rows = []
        for candidate in self.candidates(key):
            on_step(candidate)
            row = await self._row(key, candidate, entry)
            if row is None:
                return None
            entry = entry.with_verdict(row.judged)
            rows.append(row)
        return Compared(key, tuple(rows), self._choose(key, entry))

    async def _row(self, key: ModelKey, candidate: Candidate, entry: Entry) -> Row | None:
        facts = self._choices.facts(key, entry)(candidate.engine)
        known = entry.judged.get(candidate)
        is_known = known is not None and known.facts == facts and known.depth == COMPARISON
        if known is not None and is_known and not self._again:
            return Row(key, known, is_new=False)
        settings_json, limit_s = (
            self._choices.settings.model_dump_json(),
            limit_of(candidate),
        )
        order = Order(settings_json, key, candidate, COMPARISON, limit_s)
        judged = await judge_files(
            self._choices, key, entry, candidate, lambda _: self._measure(order), COMPARISON
        )
        if judged is None:
            return None
        keep(self._choices, key, entry, judged)
        return Row(key, judged, is_new=True)

    def _choose(self, key: ModelKey, entry: Entry) -> Choice:
        """By what is known now alone: here the operator asks, and faces may move."""
        slot = (key.task, key.part)
        facts = self._choices.facts(key, entry)
        choice = decide(slot, self._choices.rule(slot), replace(entry, chosen=None), facts)
        choose(self._choices, key, choice)
        return choice


def formats_of(engine: str) -> Iterable[Candidate]:
    """Every number format of an engine."""
    formats = LADDERS.get(engine, (OWN_FORMAT,))
    return (Candidate(engine, one) for one in formats)
