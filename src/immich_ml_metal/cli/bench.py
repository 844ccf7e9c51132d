"""`bench`: the service under load, beside the raw engine, in one run.

Speed is told as ratios made in the same minutes on the same machine; absolute numbers move.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from immich_ml_metal.bench.measure import BenchReport, Measured, Plan, measure_all
from immich_ml_metal.cli.output import (
    ClipOption,
    FaceOption,
    FolderOption,
    JsonOption,
    OcrOption,
    print_json,
)
from immich_ml_metal.settings_sources import load_settings

CLIENTS = (1, 2, 8)
MIB = 2**20
Photos = Annotated[
    list[Path] | None,
    typer.Argument(
        exists=True, help="Pictures or folders of pictures; drawn ones when none are named."
    ),
]
Seconds = Annotated[float, typer.Option(min=0.5, help="Length of each measurement.")]
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
    against: Against = None,
    as_json: JsonOption = False,
) -> None:
    """Measure requests per second, latency and memory; compare with the raw engine."""
    models = {"clip_model": clip_model, "face_model": face_model, "ocr_model": ocr_model}
    settings = load_settings({"models_dir": models_dir, **models})
    console = Console(stderr=as_json)

    def say(line: str) -> None:
        console.print(line, style="dim")

    report = measure_all(settings, Plan(photos or [], CLIENTS, seconds, against, say))
    if as_json:
        print_json(asdict(report))
    else:
        print_report(report, console)


def print_report(report: BenchReport, console: Console) -> None:
    """Print what was found, ratios last."""
    console.print(
        f"[bold]immich-ml-metal {report.version}[/] on {report.machine}, {report.cores} cores, "
        f"{report.pictures} pictures"
    )
    raw = {rate.task: rate.per_s for rate in report.raw}
    console.print(_raw_table(report))
    for measured in (report.ours, report.against):
        if measured is not None:
            console.print(_load_table(measured, raw))
    if report.against is not None:
        console.print(_ratio_table(report.ours, report.against))
    if report.ours.first_answer_s is not None and report.ours.resident_bytes is not None:
        console.print(
            f"First answer {report.ours.first_answer_s:.1f} s after the start; "
            f"resident memory after all tasks {report.ours.resident_bytes / MIB:.0f} MiB"
        )


def _raw_table(report: BenchReport) -> Table:
    table = Table(title="Raw engine: ONNX Runtime alone, all cores, one inference at a time")
    table.add_column("graph")
    table.add_column("model")
    table.add_column("inferences/s", justify="right")
    for rate in report.raw:
        table.add_row(rate.task, rate.model, f"{rate.per_s:.1f}")
    return table


def _load_table(measured: Measured, raw: dict[str, float]) -> Table:
    table = Table(title=measured.url)
    for name in ("task", "clients", "requests/s", "p50 ms", "p95 ms", "service/raw"):
        table.add_column(name, justify="left" if name == "task" else "right")
    for name, loads in (*measured.loads.items(), ("whole import, photos", measured.imports)):
        for load in loads:
            ratio = f"{load.per_s / raw[name]:.2f}" if name in raw else ""
            table.add_row(
                name,
                str(load.clients),
                f"{load.per_s:.1f}",
                f"{load.p50_ms:.0f}",
                f"{load.p95_ms:.0f}",
                ratio,
            )
        table.add_section()
    return table


def _ratio_table(ours: Measured, other: Measured) -> Table:
    table = Table(title=f"Ours / {other.url}, requests per second")
    table.add_column("task")
    for load in ours.imports:
        table.add_column(f"{load.clients} clients", justify="right")
    rows = {name: (loads, other.loads[name]) for name, loads in ours.loads.items()}
    rows["whole import"] = (ours.imports, other.imports)
    for name, (mine, theirs) in rows.items():
        table.add_row(
            name, *(f"{a.per_s / b.per_s:.2f}" for a, b in zip(mine, theirs, strict=True))
        )
    return table
