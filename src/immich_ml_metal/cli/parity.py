"""`parity`: does this service answer as another one does, and is switching safe?"""

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from immich_ml_metal.cli.exits import Exit
from immich_ml_metal.cli.json_output import JsonOption, print_json

if TYPE_CHECKING:
    from immich_ml_metal.parity.client import ModelNames, Service
    from immich_ml_metal.parity.compare import Comparison
    from immich_ml_metal.parity.judge import Report, TaskSummary

_EXITS = (Exit.OK, Exit.FINDING, Exit.UNSAFE, Exit.FINDING)  # by Level


Photos = Annotated[list[Path], typer.Argument(help="Pictures, or folders of pictures.")]
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
    clip_model: Annotated[str | None, typer.Option(help="CLIP model to ask for.")] = None,
    face_model: Annotated[str | None, typer.Option(help="Face model to ask for.")] = None,
    ocr_model: Annotated[str | None, typer.Option(help="Text model to ask for.")] = None,
    limit: Limit = 200,
    html: Html = None,
    as_json: JsonOption = False,
) -> None:
    """Send the same pictures and texts to two services and say whether switching is safe.

    Exit code: 0 safe to switch, 1 safe for search only, 3 a service is unreachable, 4 do not mix.
    """
    from immich_ml_metal.parity.client import Service
    from immich_ml_metal.parity.run import TASKS, TEXTS

    tasks, files = _known_tasks(task or list(TASKS), TASKS), _photos(photos, limit)
    models = {"clip_model": clip_model, "face_model": face_model, "ocr_model": ocr_model}
    url, names = _own(models)
    first, second = Service(ours or url, names), Service(against, names)
    with closing(first), closing(second):
        report = _examine(files, text or list(TEXTS), tasks, first, second)
    if html is not None:
        _write_html(html, report)
    if as_json:
        _print_json(report)
    else:
        _print_table(report)
    raise typer.Exit(_EXITS[report.verdict.level])


def _own(models: dict[str, str | None]) -> "tuple[str, ModelNames]":
    """Where our service is, and the models to ask for."""
    from immich_ml_metal.client.own_service import local_url
    from immich_ml_metal.parity.client import ModelNames
    from immich_ml_metal.settings_sources import load_settings

    settings = load_settings(models)
    names = ModelNames(settings.clip_model, settings.face_model, settings.ocr_model)
    return local_url(settings), names


def _photos(paths: Sequence[Path], limit: int) -> list[Path]:
    from immich_ml_metal.parity.run import find_photos

    files = find_photos(paths)[:limit]
    if missing := [file for file in files if not file.is_file()]:
        raise typer.BadParameter(f"no such file: {missing[0]}")
    return files


def _examine(
    files: Sequence[Path],
    texts: Sequence[str],
    tasks: Sequence[str],
    ours: "Service",
    theirs: "Service",
) -> "Report":
    from immich_ml_metal.parity.client import Unreachable
    from immich_ml_metal.parity.judge import Report, judge, summarise

    try:
        ours.ping()
        theirs.ping()
    except Unreachable as exc:
        typer.echo(f"immich-ml-metal: {exc}", err=True)
        raise typer.Exit(Exit.UNREACHABLE) from exc
    found = tuple(_compare_all(files, texts, tasks, ours, theirs))
    summaries = tuple(summarise(name, [c for c in found if c.task == name]) for name in tasks)
    cause = _find_cause(found, summaries, ours, theirs)
    return Report(ours.url, theirs.url, found, summaries, judge(summaries), cause)


def _known_tasks(wanted: Sequence[str], known: Sequence[str]) -> list[str]:
    for name in wanted:
        if name not in known:
            raise typer.BadParameter(f"unknown task {name!r}; there are: {', '.join(known)}")
    return [name for name in known if name in wanted]


def _compare_all(
    files: Sequence[Path],
    texts: Sequence[str],
    tasks: Sequence[str],
    ours: "Service",
    theirs: "Service",
) -> "Iterator[Comparison]":
    from rich.console import Console
    from rich.progress import track

    from immich_ml_metal.parity.run import compare, questions, warm_up

    console = Console(stderr=True)
    total = len(files) * sum(name != "clip text" for name in tasks)
    total += len(texts) * ("clip text" in tasks)
    with console.status("Loading the models of both services"):
        warm_up(questions(files, texts, tasks), (ours, theirs))
    asked = questions(files, texts, tasks)
    for question in track(asked, "Comparing", total=total, console=console, transient=True):
        yield compare(question, ours, theirs)


def _find_cause(
    comparisons: "Sequence[Comparison]",
    summaries: "Sequence[TaskSummary]",
    ours: "Service",
    theirs: "Service",
) -> str:
    from immich_ml_metal.parity.explain import explain_images, explain_texts
    from immich_ml_metal.parity.judge import Level

    bad = {s.task for s in summaries if s.level is Level.UNSAFE and s.minimum is not None}
    if "clip image" in bad:
        answered = [c for c in comparisons if c.task == "clip image" and c.value is not None]
        worst = min(answered, key=lambda c: c.value or 0.0)
        return explain_images(Path(worst.subject).read_bytes(), ours, theirs)
    if "clip text" in bad:
        return explain_texts(any(s.task == "clip image" for s in summaries))
    return ""


def _write_html(path: Path, report: "Report") -> None:
    from immich_ml_metal.parity.report import render_html

    path.write_text(render_html(report), encoding="utf-8")
    typer.echo(f"Wrote {path}", err=True)


def _print_json(report: "Report") -> None:
    tasks = {s.task: {**asdict(s), "level": s.level.name.lower()} for s in report.summaries}
    words = {
        "verdict": report.verdict.words,
        "reasons": report.verdict.reasons,
        "cause": report.cause,
        "tasks": tasks,
    }
    print_json(words)


def _print_table(report: "Report") -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    console.print(f"ours [bold]{report.ours}[/]  against [bold]{report.theirs}[/]")
    table = Table("task", "compared", "min", "p5", "median", "speed", box=None, header_style="bold")
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


def _faces_line(summary: "TaskSummary") -> str:
    overlap = f", median IoU {summary.iou_median:.3f}" if summary.iou_median is not None else ""
    return (
        f"faces: {summary.faces_both} found by both, {summary.faces_only_ours} only by ours, "
        f"{summary.faces_only_theirs} only by theirs{overlap}"
    )
