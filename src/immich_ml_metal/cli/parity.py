"""`parity`: does this service answer as another one does, and is switching safe?"""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track

from immich_ml_metal.cli.output import (
    ClipOption,
    Exit,
    FaceOption,
    JsonOption,
    OcrOption,
    make_table,
    print_error,
    print_json,
)
from immich_ml_metal.client.calls import (
    CALL_NAMES,
    CLIP_TEXT,
    ImmichClient,
    Unreachable,
    configured_names,
    find_photos,
    passed_over,
)
from immich_ml_metal.client.own_service import local_url
from immich_ml_metal.index_guard.guard import IndexGuard
from immich_ml_metal.parity.judge import ParityReport, TaskSummary
from immich_ml_metal.parity.report import render_html
from immich_ml_metal.parity.run import TEXTS, compare, conclude, questions, warm_up
from immich_ml_metal.settings import Settings
from immich_ml_metal.settings_sources import load_settings
from immich_ml_metal.system.owner import write_whole

_EXITS = (Exit.OK, Exit.FINDING, Exit.UNSAFE, Exit.FINDING)  # by Difference

Photos = Annotated[
    list[Path], typer.Argument(exists=True, help="Pictures, or folders of pictures.")
]
Against = Annotated[str, typer.Option(help="The other service, http://docker-host:3003.")]
Ours = Annotated[
    str | None, typer.Option("--url", help="This service; default: the configured port here.")
]
Texts = Annotated[list[str] | None, typer.Option("--text", help="A search text; repeat for more.")]
Tasks = Annotated[
    list[str] | None,
    typer.Option("--task", help="clip image, clip text, faces or text; default: all."),
]
Limit = Annotated[int, typer.Option(min=1, help="Most pictures to compare.")]
Html = Annotated[Path | None, typer.Option(help="Write a report with the worst pairs.")]


def parity(
    photos: Photos,
    against: Against,
    ours: Ours = None,
    text: Texts = None,
    task: Tasks = None,
    clip_model: ClipOption = None,
    face_model: FaceOption = None,
    ocr_model: OcrOption = None,
    limit: Limit = 200,
    html: Html = None,
    as_json: JsonOption = False,
) -> None:
    """Send the same pictures and texts to two services and say whether switching is safe.

    Exit code: 0 safe to switch, 1 safe for search only, 3 a service is unreachable, 4 do not mix.
    """
    tasks, files = _known_tasks(task or CALL_NAMES), find_photos(photos)[:limit]
    models = {"clip_model": clip_model, "face_model": face_model, "ocr_model": ocr_model}
    settings = load_settings(models)
    names = configured_names(settings)
    first, second = ImmichClient(ours or local_url(settings), names), ImmichClient(against, names)
    _tell_first(settings, photos)
    with closing(first), closing(second):
        report = _examine(files, text or TEXTS, tasks, (first, second))
    if html is not None:
        write_whole(html, render_html(report).encode())
        typer.echo(f"Wrote {html}", err=True)
    (_print_json if as_json else _print_table)(report)
    raise typer.Exit(_EXITS[report.verdict.level])


def _tell_first(settings: Settings, photos: Sequence[Path]) -> None:
    """What the comparison leaves out: files passed over, a change that waits for a word."""
    if skipped := passed_over(photos):
        more = f" and {len(skipped) - 5} more" if len(skipped) > 5 else ""
        first = ", ".join(map(str, skipped[:5]))
        typer.echo(f"not compared, no pictures that Immich sends: {first}{more}", err=True)
    for finding in IndexGuard(settings).findings():
        if finding.state == "changed":
            typer.echo(f"index: {finding.text}", err=True)


def _tell_passed_over(exc: OSError) -> None:
    print_error(f"not compared: {exc.filename}: {exc.strerror}")


def _known_tasks(wanted: Sequence[str]) -> list[str]:
    for name in wanted:
        if name not in CALL_NAMES:
            known = ", ".join(CALL_NAMES)
            raise typer.BadParameter(f"unknown task {name!r}; there are: {known}")
    return [name for name in CALL_NAMES if name in wanted]


def _examine(
    files: Sequence[Path],
    texts: Sequence[str],
    tasks: Sequence[str],
    services: tuple[ImmichClient, ImmichClient],
) -> ParityReport:
    try:
        for service in services:
            service.ping()
    except Unreachable as exc:
        print_error(exc)
        raise typer.Exit(Exit.UNREACHABLE) from exc
    console = Console(stderr=True)
    total = len(files) * len({*tasks} - {CLIP_TEXT}) + len(texts) * (CLIP_TEXT in tasks)
    with console.status("Loading the models of both services"):
        warm_up(questions(files, texts, tasks, lambda _: None), services)
    asked = questions(files, texts, tasks, _tell_passed_over)
    watched = track(asked, "Comparing", total=total, console=console, transient=True)
    return conclude([compare(question, *services) for question in watched], tasks, *services)


def _print_json(report: ParityReport) -> None:
    tasks = {s.task: {**asdict(s), "level": s.level.name.lower()} for s in report.summaries}
    words = {
        "verdict": report.verdict.words,
        "reasons": report.verdict.reasons,
        "cause": report.cause,
        "tasks": tasks,
    }
    print_json(words)


def _print_table(report: ParityReport) -> None:
    console = Console(highlight=False)
    console.print(f"ours [bold]{report.ours}[/]  against [bold]{report.theirs}[/]")
    table = make_table("task", "compared", "min", "p5", "median", "speed")
    for summary in report.summaries:
        figures = (summary.minimum, summary.p5, summary.median)
        shown = ["-" if value is None else f"{value:.5f}" for value in figures]
        speed = "-" if summary.speed is None else f"{summary.speed:.2f}x"
        table.add_row(summary.task, str(summary.count), *shown, speed)
    console.print(table)
    for summary in report.summaries:
        if summary.task == "faces" and summary.count:
            console.print(_faces_line(summary))
        for problem in summary.problems[:3]:
            console.print(f"  {summary.task}: {problem}", style="yellow", markup=False)
    colour = ("green", "yellow", "red", "yellow")[report.verdict.level]
    console.print(f"\n[bold {colour}]{report.verdict.words}[/]")
    causes = [f"most likely cause: {report.cause}"] if report.cause else []
    for reason in [*report.verdict.reasons, *causes]:
        console.print(f"  {reason}", markup=False)


def _faces_line(summary: TaskSummary) -> str:
    overlap = f", median IoU {summary.iou_median:.3f}" if summary.iou_median is not None else ""
    return (
        f"faces: {summary.faces_both} found by both, {summary.faces_only_ours} only by ours, "
        f"{summary.faces_only_theirs} only by theirs{overlap}"
    )
