"""From a rule and what was measured to the engine that answers. Pure.

With verdicts: the rule's first choice that passed; where all were compared, the fastest. Without:
the last good choice, else the CPU, until the check has spoken. Never waits, never measures.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from immich_ml_metal.backends.selection import FACE_FINDING, REFERENCE, Candidate, Rule
from immich_ml_metal.qualification.record import Entry
from immich_ml_metal.qualification.verdict import Judged
from immich_ml_metal.types import Part, Slot

# Speeds closer than this are a tie: nothing here is measured more exactly.
TIE = 1.1
# Among equally fast ones, who leaves the GPU to the person at the Mac.
_GPU_LAST = ("coreml", "vision", "cpu", "mlx", "open_clip")


@dataclass(frozen=True, slots=True)
class Choice:
    """Who answers one half of a model, and why.

    Attributes:
        is_pending: a verdict is wanted; until it is here this is the last good choice or the CPU.
        warning: what the operator should know; empty when nothing.
    """

    candidate: Candidate
    reason: str
    is_pending: bool = False
    warning: str = ""


Facts = Callable[[str], Mapping[str, str]]  # engine → what its verdicts depend on now


def decide(slot: Slot, rule: Rule, entry: Entry, facts: Facts) -> Choice:
    """Choose for one half of a model.

    Args:
        slot: which part of which task.
        rule: what may answer.
        entry: what is remembered of the model; its verdicts may be out of date.
        facts: what verdicts on an engine depend on now, the model's digest included.
    """
    if not rule.needs_verdicts:
        return _without_verdicts(rule, entry, facts)
    fresh = {
        candidate: judged
        for candidate, judged in entry.judged.items()
        if judged.facts == facts(candidate.engine)
    }
    order = _kept_faces(slot, rule, entry) or rule.candidates
    choice = _compared(slot, rule, order, fresh) or _checked(rule, order, fresh)
    if choice is None:
        return _meanwhile(slot, rule, entry, fresh)
    return _say_moved(slot, rule, entry, choice)


def _without_verdicts(rule: Rule, entry: Entry, facts: Facts) -> Choice:
    """One candidate only: it answers, whatever was found; a bad verdict is said."""
    (candidate,) = rule.candidates
    reason = f"{rule.why}, the reference" if candidate == REFERENCE else rule.why
    judged = entry.judged.get(candidate)
    if judged is None or judged.facts != facts(candidate.engine) or judged.verdict.is_usable:
        return Choice(candidate, reason)
    return Choice(candidate, reason, warning=f"{candidate} is {rule.why}, but {judged.verdict}")


def _checked(
    rule: Rule, order: Sequence[Candidate], fresh: Mapping[Candidate, Judged]
) -> Choice | None:
    """The first candidate that passed, if all before it failed; None while one is unknown."""
    failed: list[Judged] = []
    for candidate in order:
        if candidate == REFERENCE and not rule.is_explicit:
            return Choice(candidate, _after(rule, failed), warning=_failures(failed, candidate))
        if candidate not in fresh:
            return None
        if fresh[candidate].verdict.is_usable:
            return Choice(candidate, _after(rule, failed), warning=_failures(failed, candidate))
        failed.append(fresh[candidate])
    # Nothing passed, and no other engine may answer: what was asked for is used, and it is said.
    told = "; ".join(f"{one.candidate}: {one.verdict}" for one in failed)
    return Choice(order[0], rule.why, warning=f"{rule.why}, but {told}")


def _compared(
    slot: Slot, rule: Rule, order: Sequence[Candidate], fresh: Mapping[Candidate, Judged]
) -> Choice | None:
    """The fastest within the limits, where every candidate was compared; else None.

    Engines with answers of their own are no matter of speed: the rule's first family that passes.
    """
    if any(one not in fresh or fresh[one].depth != "comparison" for one in order):
        return None
    good = [one for one in order if fresh[one].verdict.is_usable]
    family = [one for one in good if one.family == good[0].family]
    timed = {one: ms for one in family if (ms := speed_ms(slot, fresh[one])) is not None}
    if not timed:
        return None
    best_ms = min(timed.values())
    tied = [one for one, ms in timed.items() if ms <= best_ms * TIE]
    chosen = min(tied, key=lambda one: _GPU_LAST.index(one.engine))
    reason = f"{rule.why}, fastest of {len(family)} that are right: {timed[chosen]:.1f} ms"
    return Choice(chosen, reason, warning=_failures([fresh[order[0]]], chosen))


def speed_ms(slot: Slot, judged: Judged) -> float | None:
    """What counts: a search text comes alone, everything else in an import comes in batches."""
    figures = judged.verdict.figures
    times = [figures.alone_ms] if slot[1] is Part.TEXTUAL else [figures.batch_ms, figures.alone_ms]
    return min((ms for ms in times if ms is not None), default=None)


def _meanwhile(slot: Slot, rule: Rule, entry: Entry, fresh: Mapping[Candidate, Judged]) -> Choice:
    """Who answers until the check has spoken."""
    last = entry.chosen
    if last in rule.candidates and (last not in fresh or fresh[last].verdict.is_usable):
        return Choice(last, f"{rule.why}, last good choice until it is checked", is_pending=True)
    if rule.is_explicit:
        return Choice(rule.candidates[0], f"{rule.why}, not checked yet", is_pending=True)
    first = next(one for one in rule.candidates if one not in fresh or fresh[one].verdict.is_usable)
    if slot == FACE_FINDING and first.family != REFERENCE.family:
        # The CPU finds faces by other points: people would be made of two kinds of vectors.
        return Choice(first, f"{rule.why}, not checked yet", is_pending=True)
    return Choice(REFERENCE, f"{rule.why}, until {first} is checked", is_pending=True)


# -- faces stay with the points they were made from ------------------------------------------------


def _kept_faces(slot: Slot, rule: Rule, entry: Entry) -> tuple[Candidate, ...] | None:
    """The candidates with those of the family that found this library's faces first."""
    if slot != FACE_FINDING or entry.chosen is None or entry.chosen_under != rule.why:
        return None
    family = entry.chosen.family
    same = tuple(one for one in rule.candidates if one.family == family)
    return (*same, *(one for one in rule.candidates if one.family != family))


def _say_moved(slot: Slot, rule: Rule, entry: Entry, choice: Choice) -> Choice:
    first = rule.candidates[0]
    if slot != FACE_FINDING or choice.candidate.family == first.family or rule.is_explicit:
        return choice
    moved = (
        f"faces are found by {choice.candidate.engine} and not by {first.engine} as {rule.why} "
        "means: vectors of the same person differ a little between the two. They stay there until "
        "you run immich-ml-metal qualify"
    )
    warning = f"{choice.warning}; {moved}" if choice.warning else moved
    return Choice(choice.candidate, choice.reason, choice.is_pending, warning)


# -- words -----------------------------------------------------------------------------------------


def _after(rule: Rule, failed: Sequence[Judged]) -> str:
    names = ", ".join(str(one.candidate) for one in failed)
    return f"{rule.why}, {names} not usable" if failed else rule.why


def _failures(failed: Iterable[Judged], chosen: Candidate) -> str:
    """Why other engines are not used; another format of the same one is no matter of concern."""
    return "; ".join(
        f"{one.candidate} is not used: {one.verdict}"
        for one in failed
        if one.candidate.engine != chosen.engine and not one.verdict.is_usable
    )
