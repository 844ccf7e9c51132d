"""What a probe is told and what it answers: one line of JSON in, lines of JSON out."""

import json
from dataclasses import dataclass
from typing import Any

from immich_ml_metal.backends.selection import Candidate
from immich_ml_metal.qualification.verdict import Verdict
from immich_ml_metal.types import ModelKey, Part, Task

CHECK, COMPARISON = "check", "comparison"


@dataclass(frozen=True, slots=True)
class Order:
    """One candidate, one half of a model, one depth.

    Attributes:
        settings_json: the service's settings.
        limit_s: after which the probe ends itself, whatever it hangs in.
    """

    settings_json: str
    key: ModelKey
    candidate: Candidate
    depth: str
    limit_s: float

    def dump(self) -> bytes:
        """As a line."""
        key = [self.key.task, self.key.part, self.key.name]
        told = {
            "settings": self.settings_json,
            "key": key,
            "candidate": [self.candidate.engine, self.candidate.number_format],
            "depth": self.depth,
            "limit_s": self.limit_s,
        }
        return json.dumps(told).encode() + b"\n"

    @classmethod
    def load(cls, line: bytes) -> "Order":
        """Read what `dump` gives."""
        told = json.loads(line)
        task, part, name = told["key"]
        return cls(
            told["settings"],
            ModelKey(Task(task), Part(part), name),
            Candidate(*told["candidate"]),
            told["depth"],
            float(told["limit_s"]),
        )


@dataclass(frozen=True, slots=True)
class Report:
    """What a probe found.

    Attributes:
        step: what it was doing last, for a probe that says no more.
        verdict: None when it ended before it had one.
    """

    step: str = "starting"
    verdict: Verdict | None = None


def step_line(step: str) -> str:
    """Say what is done next."""
    return json.dumps({"step": step})


def verdict_line(verdict: Verdict) -> str:
    """Say what was found."""
    return json.dumps({"verdict": verdict.as_dict()})


def read_report(out: bytes) -> Report:
    """What the lines of a probe say; a torn last line is what a killed process leaves."""
    step, verdict = "starting", None
    for line in out.splitlines():
        try:
            told: dict[str, Any] = json.loads(line)
            step = told.get("step", step)
            verdict = Verdict.from_dict(told["verdict"]) if "verdict" in told else verdict
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue
    return Report(step, verdict)
