"""`bench`: the service under load, beside the raw engine, in one run.

Speed is told as ratios made in the same minutes on the same machine; absolute numbers move.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from immich_ml_metal.bench.machine import TOO_BUSY
from immich_ml_metal.bench.measure import (
    BenchReport,
    Figure,
    Measured,
    Plan,
    Row,
    measure_all,
    ratios,
)
from immich_ml_metal.cli.output import (
    ClipOption,
    FaceOption,
    FolderOption,
    JsonOption,
    OcrOption,
    make_table,
    print_json,
)
from immich_ml_metal.setting_kinds import format_bytes
from immich_ml_metal.settings_sources import load_settings

CLIENTS = (1, 2, 8)
_COLUMNS = ("", "in flight", "per s", "p50 ms", "p95 ms", "cpu ms", "service/raw")
Photos = Annotated[
    list[Path] | None,
    typer.Argument(
        exists=True, help="Pictures or folders of pictures; drawn ones when none are named."
    ),
]
Seconds = Annotated[float, typer.Option(min=0.5, help="Length of each measurement.")]
Rounds = Annotated[int, typer.Option(min=1, help="Measurements of each kind; medians count.")]
ImportOnly = Annotated[
    bool, typer.Option("--import-only", help="Leave out the single tasks: import and search.")
]
Against = Annotated[
    str | None, typer.Option(help="A second service, measured in turn with ours: its address.")
]


def bench(
    photos: Photos = None,
    models_dir: FolderOption = None,
    clip_model: ClipOption = None,
    face_model: FaceOption = None,
    ocr_model: OcrOption = None,
    seconds: Seconds = 6.0,
    rounds: Rounds = 3,
    import_only: ImportOnly = False,
    against: Against = None,
    as_json: JsonOption = False,
) -> None:
    """Measure each task, an import, searches beside it, processor time and memory."""
    models = {"clip_model": clip_model, "face_model": face_model, "ocr_model": ocr_model}
    settings = load_settings({"models_dir": models_dir, **models})
    console = Console(stderr=as_json)

    def say(line: str) -> None:
        console.print(line, style="dim")

    clients = () if import_only else CLIENTS
    plan = Plan(photos or [], clients, seconds, rounds, against and against.rstrip("/"), say)
    report = measure_all(settings, plan)
    if as_json:
        print_json(asdict(report))
    else:
        print_report(report, console)


def print_report(report: BenchReport, console: Console) -> None:
    """Print what was found, ratios last, and whether the machine was quiet."""
    console.print(
        f"[bold]immich-ml-metal {report.version}[/] on {report.machine}, {report.cores} cores, "
        f"{report.pictures} pictures, each request another one; medians of {report.rounds} rounds"
    )
    raw = {rate.task: rate.per_s for rate in report.raw}
    if report.raw:
        console.print(_raw_table(report))
    for measured in (report.ours, report.against):
        if measured is not None:
            console.print(_load_table(measured, raw))
            console.print(_memory_line(measured))
    if report.against is not None:
        console.print(_ratio_table(report.ours, report.against))
    share = f"{100 * report.others_share:.0f} % of the cores"
    if report.others_share > TOO_BUSY:
        console.print(f"[bold]Too busy to tell[/]: other programs used {share} meanwhile.")
    else:
        console.print(f"The machine was quiet: other programs used {share}.")


def _raw_table(report: BenchReport) -> Table:
    table = make_table("graph", "model", "inferences/s", right=("inferences/s",))
    table.title = "Raw engine: ONNX Runtime alone, all cores, one inference at a time"
    for rate in report.raw:
        table.add_row(rate.task, rate.model, f"{rate.per_s:.1f}")
    return table


def _load_table(measured: Measured, raw: dict[str, float]) -> Table:
    table = make_table(*_COLUMNS, right=_COLUMNS[1:])
    table.title = measured.url
    for row in measured.rows:
        rate = row.figure("per_s")
        table.add_row(
            row.name,
            str(row.clients),
            _spread(rate, 1),
            _spread(row.figure("p50_ms"), 0),
            _spread(row.figure("p95_ms"), 0),
            "" if row.loads[0].cpu_ms is None else _spread(row.figure("cpu_ms"), 0),
            f"{rate.median / raw[row.name]:.2f}" if row.name in raw else "",
        )
    return table


def _memory_line(measured: Measured) -> str:
    if measured.idle_private_bytes is None:
        return "Its memory and processor time are not seen from here."
    first_s = measured.first_answer_s
    start = "" if first_s is None else f"First answer {first_s:.1f} s after the start; "
    return (
        f"{start}memory of its own {format_bytes(measured.idle_private_bytes)} when idle, "
        f"{format_bytes(measured.busy_private_bytes or 0)} under load; "
        f"with mapped models {format_bytes(measured.resident_bytes or 0)}"
    )


def _ratio_table(ours: Measured, other: Measured) -> Table:
    table = make_table("", "in flight", "ratio", right=("in flight", "ratio"))
    table.title = f"Ours / {other.url}, answers per second, round by round"
    for mine, theirs in zip(ours.rows, other.rows, strict=True):
        if _is_paced(mine):
            continue
        table.add_row(mine.name, str(mine.clients), _spread(ratios(mine, theirs), 2))
    return table


def _is_paced(row: Row) -> bool:
    """Searches come at a person's pace: their rate says nothing, their latency does."""
    return row.name.startswith("search")


def _spread(figure: Figure, digits: int) -> str:
    if figure.low == figure.high:
        return f"{figure.median:.{digits}f}"
    return f"{figure.median:.{digits}f} ({figure.low:.{digits}f}-{figure.high:.{digits}f})"
