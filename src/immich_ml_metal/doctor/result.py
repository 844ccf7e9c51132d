"""The outcome of a check, and which outcome is the cause of the others."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from immich_ml_metal.doctor.facts import Facts


class Level(StrEnum):
    """How a check came out."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"
    SKIP = "skip"


@dataclass(frozen=True, slots=True)
class Result:
    """One line of the report.

    Attributes:
        name: of the check.
        text: what was found.
        fix: what to do, a command where there is one.
        follows: name of the failed check that explains this failure; empty for a cause.
    """

    name: str
    level: Level
    text: str
    fix: str = ""
    follows: str = ""


@dataclass(frozen=True, slots=True)
class Check:
    """A question about the facts.

    Attributes:
        after: checks whose failure explains a failure of this one.
    """

    name: str
    ask: Callable[[Facts], tuple[Level, str, str]]
    after: tuple[str, ...] = ()


def examine(checks: Sequence[Check], facts: Facts) -> list[Result]:
    """Ask every check in order; a failure that an earlier one explains points to it."""
    results: dict[str, Result] = {}
    for check in checks:
        level, text, fix = check.ask(facts)
        result = Result(check.name, level, text, fix)
        if level is Level.FAIL:
            result = replace(result, follows=_cause(check, results))
        results[check.name] = result
    return list(results.values())


def first_cause(results: Sequence[Result]) -> Result | None:
    """The failure to fix first: the first that no other explains."""
    return next((r for r in results if r.level is Level.FAIL and not r.follows), None)


def _cause(check: Check, results: dict[str, Result]) -> str:
    for name in check.after:
        earlier = results.get(name)
        if earlier is not None and earlier.level is Level.FAIL:
            return earlier.follows or name
    return ""
