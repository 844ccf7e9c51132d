"""Immich's queues and our service on one page: how fast, how long still, what is wrong. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from immich_ml_metal.immich.api import QueueCounts, ServerSettings
from immich_ml_metal.immich.records import Records
from immich_ml_metal.types import QUEUES

FAILED_IS_ZERO = 'Immich\'s own "failed" column is always 0: it does not count the jobs it lost'


@dataclass(frozen=True, slots=True)
class QueueView:
    """One task.

    Attributes:
        model: as Immich's settings name it; empty when the task is switched off there.
        at_once: jobs that Immich runs at once.
        per_s: good answers per second now; None when our service does not tell.
        left_s: until the queue is empty at that rate; None when that cannot be said.
        paused_by: empty when it is not paused; `us` or `somebody else`.
        why: why we paused it, or what fails since when; empty when nothing does.
        missing: what is to be asked for, or runs; empty when nothing is.
    """

    task: str
    queue: str
    model: str
    at_once: int | None
    active: int
    waiting: int
    per_s: float | None = None
    left_s: float | None = None
    paused_by: str = ""
    why: str = ""
    missing: str = ""


@dataclass(frozen=True, slots=True)
class Overview:
    """Everything that `immich status` shows beside advice.

    Attributes:
        guard: `on`, or why no queue is paused when we cannot serve.
        unplanned_end: when a start last found that the run before had not ended as planned.
        failures: cause → how many answers failed for it, of the last ones.
        refused: status → what was refused, how often, why and when.
    """

    is_running: bool
    queues: tuple[QueueView, ...]
    guard: str
    unplanned_end: str | None
    failures: Mapping[str, int]
    refused: Mapping[str, Mapping[str, Any]]


def overlook(
    server: ServerSettings,
    queues: Mapping[str, QueueCounts],
    health: Mapping[str, Any] | None,
    records: Records,
) -> Overview:
    """Put it together.

    Args:
        server: Immich's settings.
        queues: its queues, by task.
        health: what our service says of itself; None when it does not run. Any: its JSON.
        records: what the guard has written down.
    """
    said = health or {}
    guard = said.get("guard", {"why_off": "our service is not running"})
    views = [
        _view(task, server, counts, said, records)
        for task, counts in queues.items()
        if task in QUEUES
    ]
    return Overview(
        is_running=health is not None,
        queues=tuple(views),
        guard=guard.get("why_off") or "on",
        unplanned_end=records.unplanned_end,
        failures=said.get("failures", {}).get("by_cause", {}),
        refused=said.get("refused", {}),
    )


def _view(
    task: str,
    server: ServerSettings,
    counts: QueueCounts,
    said: Mapping[str, Any],
    records: Records,
) -> QueueView:
    per_s = said.get("rates", {}).get(QUEUES[task])
    ours = records.paused.get(task)
    return QueueView(
        task=task,
        queue=QUEUES[task],
        model=server.models.get(task, ""),
        at_once=server.concurrency.get(task),
        active=counts.active,
        waiting=counts.waiting,
        per_s=per_s,
        left_s=counts.waiting / per_s if per_s and not counts.is_paused else None,
        paused_by=("us" if ours else "somebody else") if counts.is_paused else "",
        why=f"{ours.reason}, since {ours.since}" if ours else _trouble(task, said),
        missing=_missing(QUEUES[task], said),
    )


def _trouble(task: str, said: Mapping[str, Any]) -> str:
    return "; ".join(
        f"{trouble['model']} {trouble['reason']}, {trouble['in_row']} in a row "
        f"since {trouble['since']}"
        for trouble in said.get("troubles", [])
        if trouble["task"] == task
    )


def _missing(queue: str, said: Mapping[str, Any]) -> str:
    run = said.get("guard", {}).get("missing_runs", {}).get(queue)
    if run is None:
        return ""
    if run["is_running"]:
        return "missing results were asked for; the run is not over yet"
    if run["wanted_for"]:
        waits = f", when {run['waits_for']} no more" if run["waits_for"] else ""
        return f"missing results will be asked for after {run['wanted_for']}{waits}"
    return f"missing results were asked for {run['last_asked_s_ago']} s ago"
