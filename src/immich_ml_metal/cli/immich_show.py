"""What `immich status` prints: tables for people, one document for scripts."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.text import Text

from immich_ml_metal.cli.output import make_table
from immich_ml_metal.immich.overview import FAILED_IS_ZERO, Overview, QueueView

if TYPE_CHECKING:
    from immich_ml_metal.immich.advice import Advice
    from immich_ml_metal.immich.api import ServerSettings

_BAR_CELLS = 20


def report(
    server: "ServerSettings", overview: Overview, failed: int | None, advice: "list[Advice]"
) -> dict[str, Any]:
    """For `--json`. Any: plain values."""
    return {
        "server": asdict(server),
        "queues": {view.task: asdict(view) for view in overview.queues},
        "guard": overview.guard,
        "unplanned_end": overview.unplanned_end,
        "failures": dict(overview.failures),
        "refused": dict(overview.refused),
        "answers_failed_since_start": failed,
        "advice": [asdict(item) for item in advice],
    }


def show(
    overview: Overview, failed: int | None, advice: "list[Advice]", title: str
) -> RenderableType:
    """The whole page."""
    shown = "our service is not running" if failed is None else f"{failed} since our start"
    lines = [
        Text(f"looking after the queues: {overview.guard}"),
        Text(f"answers we failed: {shown} ({FAILED_IS_ZERO})"),
    ]
    if overview.unplanned_end:
        lines.append(Text(f"last unplanned end: {overview.unplanned_end}"))
    lines += [Text(f"  {count} x {cause}") for cause, count in overview.failures.items()]
    lines += [
        Text(f"refused with {status}: {one['count']}, last: {one['last_reason']}")
        for status, one in overview.refused.items()
    ]
    return Group(Text(title), queue_table(overview), *lines, *map(_advice, advice))


def queue_table(overview: Overview, most: "dict[str, int] | None" = None) -> RenderableType:
    """One line per task, and what keeps it back below.

    With `most` (jobs at the beginning, by task) a bar shows what is done of them.
    """
    names = ("task", "Immich's model", "at once", "active", "waiting", "per s", "left", "")
    table = make_table(*names)
    for view in overview.queues:
        bar = _bar(view, most) if most is not None else ""
        table.add_row(
            view.task,
            view.model or "off",
            str(view.at_once or "-"),
            str(view.active),
            str(view.waiting),
            "-" if view.per_s is None else f"{view.per_s:.1f}",
            "-" if view.left_s is None else spell_time(view.left_s),
            bar,
        )
    return Group(table, *(note for view in overview.queues if (note := _note(view))))


def _bar(view: QueueView, most: dict[str, int]) -> RenderableType:
    here = view.waiting + view.active
    total = most[view.task] = max(most.get(view.task, 0), here)
    return ProgressBar(total=max(total, 1), completed=max(total, 1) - here, width=_BAR_CELLS)


def _note(view: QueueView) -> Text:
    paused = f"paused by {view.paused_by}" if view.paused_by else ""
    words = "; ".join(word for word in (paused, view.why, view.missing) if word)
    style = "yellow" if view.paused_by or view.why else ""
    return Text(f"{view.task}: {words}" if words else "", style=style)


def _advice(item: "Advice") -> Text:
    mark, style = ("!", "red") if item.is_fault else ("-", "")
    return Text(f" {mark} {item.text}", style=style)


def spell_time(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 20 min`."""
    minutes, hours = seconds / 60, int(seconds // 3600)
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{hours} h {int(minutes) % 60} min" if hours else f"{minutes:.0f} min"
