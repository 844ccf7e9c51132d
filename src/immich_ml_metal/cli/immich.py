"""`immich status|requeue|release`: see the Immich server's side, and bring lost jobs back."""

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from typing import TYPE_CHECKING, Annotated

import typer

from immich_ml_metal.cli.output import Exit, JsonOption, print_json
from immich_ml_metal.setting_kinds import hide_passwords

if TYPE_CHECKING:
    from immich_ml_metal.immich.advice import Advice
    from immich_ml_metal.immich.api import ImmichApi, ServerSettings
    from immich_ml_metal.immich.overview import Overview
    from immich_ml_metal.settings import Settings

_WATCH_S = 2.0

app = typer.Typer(
    help="See the Immich server's settings and queues; bring back lost jobs.", no_args_is_help=True
)


@app.command("status")
def status(
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure what more concurrency would give (a minute).")
    ] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Keep showing the queues, with bars, until Ctrl-C.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show Immich's queues and settings beside ours, with advice.

    Exit code: 0 fine, 1 photos go without results until something is changed, 3 unreachable.
    """
    with _connected() as (api, settings):
        server = api.settings()
        if watch:
            _watch(api, settings, server)
            return
        overview = _overview(api, settings, server)
    advice = _advise(settings, server, measure=measure)
    _show_status(settings, server, overview, advice, as_json=as_json)
    raise typer.Exit(Exit.FINDING if any(item.is_fault for item in advice) else Exit.OK)


def _advise(settings: "Settings", server: "ServerSettings", *, measure: bool) -> "list[Advice]":
    from immich_ml_metal.immich.advice import advise
    from immich_ml_metal.immich.our_side import look_at_ours

    return advise(server, look_at_ours(settings, server, measure=measure))


def _show_status(
    settings: "Settings",
    server: "ServerSettings",
    overview: "Overview",
    advice: "list[Advice]",
    *,
    as_json: bool,
) -> None:
    from rich.console import Console

    from immich_ml_metal.cli.immich_show import report, show

    failed = _failed_answers(settings)
    if as_json:
        print_json(report(server, overview, failed, advice))
        return
    urls = ", ".join(server.urls)
    address = hide_passwords(str(settings.immich_url))
    title = f"Immich {server.version} at {address}, its URLs: {urls}"
    Console(highlight=False).print(show(overview, failed, advice, title))


def _overview(api: "ImmichApi", settings: "Settings", server: "ServerSettings") -> "Overview":
    from immich_ml_metal.client.own_service import NotServing, ask_health, local_url
    from immich_ml_metal.immich.overview import overlook
    from immich_ml_metal.immich.records import Records
    from immich_ml_metal.immich.release import state_folder
    from immich_ml_metal.state import StateUnusable

    queues = api.queues()
    health, records = None, Records()
    with suppress(NotServing):
        health = ask_health(local_url(settings)).raw
    with suppress(StateUnusable):
        records = Records.load(state_folder(settings))
    return overlook(server, queues, health, records)


def _watch(api: "ImmichApi", settings: "Settings", server: "ServerSettings") -> None:
    from rich.live import Live

    from immich_ml_metal.cli.immich_show import queue_table

    most: dict[str, int] = {}
    with suppress(KeyboardInterrupt), Live(auto_refresh=False) as live:
        while True:
            overview = _overview(api, settings, server)
            live.update(queue_table(overview, most), refresh=True)
            time.sleep(_WATCH_S)


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
