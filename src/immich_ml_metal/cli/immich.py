"""`immich status|requeue|release`: see the Immich server's side, and bring lost jobs back."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from immich_ml_metal.cli.output import Exit, JsonOption, print_json
from immich_ml_metal.setting_kinds import hide_passwords

if TYPE_CHECKING:
    from rich.table import Table

    from immich_ml_metal.immich.advice import Advice
    from immich_ml_metal.immich.api import ImmichApi, QueueCounts, ServerSettings
    from immich_ml_metal.settings import Settings

app = typer.Typer(
    help="See the Immich server's settings and queues; bring back lost jobs.", no_args_is_help=True
)


@app.command("status")
def status(
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure what more concurrency would give (a minute).")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show Immich's machine-learning settings beside ours, with advice.

    Exit code: 0 fine, 1 photos go without results until something is changed, 3 unreachable.
    """
    from immich_ml_metal.immich.advice import advise
    from immich_ml_metal.immich.api import ImmichError, connect
    from immich_ml_metal.immich.our_side import look_at_ours
    from immich_ml_metal.settings_sources import load_settings

    settings = load_settings()
    try:
        with closing(connect(settings.immich_url, settings.immich_api_key)) as api:
            server, queues = api.settings(), api.queues()
    except ImmichError as exc:
        typer.echo(f"immich-ml-metal: {exc}", err=True)
        raise typer.Exit(Exit.UNREACHABLE) from exc
    advice = advise(server, look_at_ours(settings, server, measure=measure))
    failed = _failed_answers(settings)
    if as_json:
        _print_json(server, queues, failed, advice)
    else:
        _print_tables(settings, server, queues, failed, advice)
    raise typer.Exit(Exit.FINDING if any(item.is_fault for item in advice) else Exit.OK)


@app.command("requeue")
def requeue(
    task: Annotated[
        list[str] | None,
        typer.Option("--task", help="clip, facial-recognition or ocr; default: all."),
    ] = None,
) -> None:
    """Start Immich's "missing" runs: every photo without a result is asked for again.

    Exit code: 0 started, 1 a queue works just now, 3 Immich is unreachable or refuses.
    """
    from immich_ml_metal.immich.release import ask_for_missing
    from immich_ml_metal.types import Task

    if wrong := [name for name in task or [] if name not in {*Task}]:
        raise typer.BadParameter(f"unknown task {wrong[0]!r}; there are: {', '.join(Task)}")
    with _connected() as (api, _):
        all_started = ask_for_missing(api, task or list(Task), _tell_asked)
    raise typer.Exit(Exit.OK if all_started else Exit.FINDING)


def _tell_asked(queue: str, is_started: bool) -> None:
    if is_started:
        typer.echo(f"Asked Immich for the missing {queue} jobs.")
    else:
        typer.echo(f"{queue} works just now, so Immich starts nothing in it: ask again later.")


@app.command("release")
def release(
    everything: Annotated[
        bool, typer.Option("--all", help="Resume what somebody else has paused as well.")
    ] = False,
) -> None:
    """Resume Immich's queues that this service has paused, for example to go back to Docker.

    Exit code: 0 done, 1 what we paused cannot be read, 3 Immich is unreachable or refuses.
    """
    from immich_ml_metal.immich.release import release, state_folder

    with _connected() as (api, settings):
        done = release(api, state_folder(settings), everything=everything)
    for queue in done.resumed:
        typer.echo(f"{queue} goes on.")
    for queue in done.others:
        typer.echo(f"{queue} is paused, but not by us; with --all it goes on as well.")
    if not done.resumed and not done.others:
        typer.echo("No queue is paused.")


@contextmanager
def _connected() -> "Iterator[tuple[ImmichApi, Settings]]":
    """Immich and the settings that lead to it; one that cannot be asked ends the command."""
    from immich_ml_metal.immich.api import ImmichError, connect
    from immich_ml_metal.settings_sources import load_settings

    settings = load_settings()
    try:
        with closing(connect(settings.immich_url, settings.immich_api_key)) as api:
            yield api, settings
    except ImmichError as exc:
        typer.echo(f"immich-ml-metal: {exc}", err=True)
        raise typer.Exit(Exit.UNREACHABLE) from exc


def _failed_answers(settings: "Settings") -> int | None:
    """How many `/predict` answers were failures of ours since the start; None not known."""
    from immich_ml_metal.client.own_service import (
        LOST_FROM_STATUS,
        NotServing,
        answers_by_status,
        local_url,
    )

    try:
        counts = answers_by_status(local_url(settings))
    except NotServing:
        return None
    return sum(count for status, count in counts.items() if status >= LOST_FROM_STATUS)


def _print_json(
    server: "ServerSettings",
    queues: "dict[str, QueueCounts]",
    failed: int | None,
    advice: "list[Advice]",
) -> None:
    report = {
        "server": asdict(server),
        "queues": {task: asdict(counts) for task, counts in queues.items()},
        "answers_failed_since_start": failed,
        "advice": [asdict(item) for item in advice],
    }
    print_json(report)


def _print_tables(
    settings: "Settings",
    server: "ServerSettings",
    queues: "dict[str, QueueCounts]",
    failed: int | None,
    advice: "list[Advice]",
) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    console.print(
        f"Immich {server.version} at {hide_passwords(str(settings.immich_url))}", markup=False
    )
    console.print(f"  its URLs: {', '.join(server.urls)}", markup=False)
    console.print(_queue_table(server, queues))
    shown = "our service is not running" if failed is None else f"{failed} since our start"
    console.print(f"answers we failed: {shown}")
    for item in advice:
        mark, style = ("!", "red") if item.is_fault else ("-", "")
        console.print(f" {mark} {item.text}", style=style, markup=False)


def _queue_table(server: "ServerSettings", queues: "dict[str, QueueCounts]") -> "Table":
    from rich.table import Table

    from immich_ml_metal.types import Task

    table = Table("task", "Immich's model", "at once", "active", "waiting", "failed", box=None)
    for task in Task:
        counts = queues.get(task)
        row = (counts.active, counts.waiting, counts.failed) if counts else ("-", "-", "-")
        paused = " (paused)" if counts and counts.is_paused else ""
        table.add_row(
            task + paused,
            server.models.get(task, "off"),
            str(server.concurrency.get(task, "-")),
            *(str(value) for value in row),
        )
    return table
