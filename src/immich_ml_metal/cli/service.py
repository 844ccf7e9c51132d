"""`service ...`: start at boot, stop, see, read the logs."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from immich_ml_metal import __version__
from immich_ml_metal.cli.config import write_private
from immich_ml_metal.cli.output import EnvFileOption, Exit, JsonOption, print_error, print_json
from immich_ml_metal.errors import ServiceError

if TYPE_CHECKING:
    from immich_ml_metal.service.plan import Manager, ServicePlan
    from immich_ml_metal.settings import Settings

app = typer.Typer(
    help="Start at boot (launchd on macOS, systemd on Linux), stop, see, read the logs.",
    no_args_is_help=True,
)

DaemonOption = Annotated[
    bool,
    typer.Option("--daemon", help="macOS: run without anybody logged in; needs sudo."),
]


@app.command("install")
def install(
    daemon: DaemonOption = False,
    env_file: EnvFileOption = None,
    show: Annotated[bool, typer.Option("--print", help="Show it; change nothing.")] = False,
) -> None:
    """Start the service now and at every boot; run it again after an upgrade."""
    from immich_ml_metal.service.traces import keep_in_file
    from immich_ml_metal.settings_sources import resolve
    from immich_ml_metal.settings_text import shown
    from immich_ml_metal.worker.compose import check_start

    resolved = resolve(env_file=env_file)
    settings = resolved.settings
    check_start(settings)
    file, content, is_new = keep_in_file(resolved, env_file)
    manager = _manager(daemon=daemon)
    plan = _plan(settings, file)
    text = _rendered(manager, plan)
    if content:
        typer.echo(f"# {file}: what is set\n{shown(content)}")
    if show:
        typer.echo(f"# {manager.definition}\n{text}")
        return
    _warn_of_privacy(settings, file)
    with _undone_on_failure(manager, file if is_new else None):
        if file is not None and is_new:
            write_private(file, content)
        manager.install(plan)
    _tell_installed(manager, plan, daemon=daemon)


def _rendered(manager: "Manager", plan: "ServicePlan") -> str:
    text = manager.render(plan)
    if problem := manager.validate(text):
        print_error(problem)
        raise typer.Exit(Exit.FINDING)
    return text


def _tell_installed(manager: "Manager", plan: "ServicePlan", *, daemon: bool) -> None:
    import platform

    typer.echo(f"Wrote {manager.definition}")
    typer.echo(f"It runs {' '.join(plan.command)}, now and at every boot.")
    typer.echo(f"Logs: {plan.log_file}")
    if platform.system() == "Linux":
        typer.echo("To run without being logged in: loginctl enable-linger")
    elif not daemon:
        typer.echo("It starts when you log in. For a Mac that nobody logs in to: --daemon.")


@contextmanager
def _undone_on_failure(manager: "Manager", file: Path | None) -> Iterator[None]:
    """When the body fails, all is as before: files, their folders, and the service that ran."""
    touched = [manager.definition, *([file] if file else [])]
    before = {path: path.read_bytes() if path.exists() else None for path in touched}
    new = [folder for path in touched for folder in path.parents if not folder.exists()]
    try:
        yield
    except BaseException:
        with suppress(ServiceError, OSError):
            if before[manager.definition] is None:
                manager.uninstall()
        for path, content in before.items():
            _put_back(path, content, is_private=path == file)
        with suppress(ServiceError, OSError):
            if before[manager.definition] is not None:
                manager.reload()
        for folder in new:
            with suppress(OSError):
                folder.rmdir()
        raise


def _put_back(path: Path, content: bytes | None, *, is_private: bool) -> None:
    """Make a file what it was, None for not there; what cannot be undone is told."""
    from immich_ml_metal.system.disk import explain_write
    from immich_ml_metal.system.owner import write_whole

    try:
        if content == (path.read_bytes() if path.exists() else None):
            return
        if content is None:
            path.unlink()
        else:
            write_whole(path, content, is_private=is_private)
    except OSError as exc:
        print_error(f"{path} is not as it was: {explain_write(exc, path)}")


def _warn_of_privacy(settings: "Settings", file: Path | None) -> None:
    """What macOS will keep from the job, before it is one."""
    import platform

    from immich_ml_metal.service import mac_privacy

    if platform.system() != "Darwin":
        return
    closed = mac_privacy.unreadable(mac_privacy.used_paths(settings, file), Path.home())
    if closed:
        typer.echo(f"Warning: {mac_privacy.explain_unreadable(closed)}.", err=True)
    if mac_privacy.needs_local_network(settings, platform.mac_ver()[0]):
        typer.echo(f"Note: {mac_privacy.EXPLAIN_LOCAL_NETWORK}.", err=True)


@app.command("uninstall")
def uninstall(
    daemon: DaemonOption = False,
    purge: Annotated[
        bool, typer.Option("--purge", help="Also remove settings, logs and what it remembers.")
    ] = False,
) -> None:
    """Stop the service and forget it. Models stay; settings and logs too without --purge."""
    from immich_ml_metal.service import traces

    manager = _manager(daemon=daemon)
    settings = traces.settings_of(manager)
    config = traces.config_of(manager.command())
    was_there = manager.definition.exists()
    manager.uninstall()
    typer.echo(f"Removed {manager.definition}" if was_there else "No service was installed.")
    _release(settings)
    for removed in traces.purge(settings) if purge else ():
        typer.echo(f"Removed {removed}")
    for left in traces.what_stays(settings, config) if purge else ():
        typer.echo(f"Left: {left}")


@app.command("start")
def start(daemon: DaemonOption = False) -> None:
    """Start the installed service."""
    _installed(daemon=daemon).start()
    typer.echo("Started.")


@app.command("stop")
def stop(daemon: DaemonOption = False) -> None:
    """Stop it, once what is in flight is answered, until the next start or boot."""
    from immich_ml_metal.immich.release import paused_by_us
    from immich_ml_metal.service.traces import settings_of

    manager = _installed(daemon=daemon)
    manager.stop()
    typer.echo("Stopped.")
    if queues := paused_by_us(settings_of(manager)):
        typer.echo(
            f"Immich's queues {', '.join(queues)} stay paused, so that no job is lost, until the "
            "service starts again.\nTo let them go on without it: immich-ml-metal immich release"
        )


@app.command("restart")
def restart(daemon: DaemonOption = False) -> None:
    """Replace the running process, for example after an upgrade."""
    _installed(daemon=daemon).restart()
    typer.echo("Restarted.")


@app.command("status")
def status(
    daemon: DaemonOption = False,
    as_json: JsonOption = False,
) -> None:
    """Say whether it runs, and whether what runs is what is installed.

    Exit code: 0 running and current, 1 not running, or an old version is still serving.
    """
    from immich_ml_metal.client.own_service import NotServing, ask_health, local_url
    from immich_ml_metal.service.traces import settings_of

    manager = _manager(daemon=daemon)
    state = manager.status()
    url = local_url(settings_of(manager))
    try:
        serving = ask_health(url).version
    except NotServing:
        serving = None
    is_current = serving == __version__
    if as_json:
        words = {"state": state.state, "pid": state.pid, "last_exit": state.last_exit}
        versions = {"url": url, "serving": serving, "installed": __version__}
        print_json({**words, **versions})
    else:
        typer.echo(f"service: {_state_words(state.state, state.pid, state.last_exit)}")
        typer.echo(_serving_words(url, serving))
    raise typer.Exit(Exit.OK if state.state == "running" and is_current else Exit.FINDING)


@app.command("logs")
def logs(
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, help="Lines of each file.")] = 50,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with new lines.")] = False,
    daemon: DaemonOption = False,
) -> None:
    """Print the end of the logs: gateway, worker, and what could not be logged."""
    from immich_ml_metal.service.log_files import log_files, tail
    from immich_ml_metal.service.traces import settings_of

    files = log_files(settings_of(_manager(daemon=daemon)))
    present = [file for file in files if file.is_file()]
    if not present:
        print_error(f"no log yet at {files[0]}")
        raise typer.Exit(Exit.FINDING)
    for file in present:
        typer.echo(f"==> {file} <==")
        typer.echo("\n".join(tail(file, lines)))
    if follow:
        _follow(present)


def _release(settings: "Settings") -> None:
    """Nobody of ours comes back: let Immich's queues go on, or say how."""
    from contextlib import closing

    from immich_ml_metal.immich.api import connect
    from immich_ml_metal.immich.records import Records
    from immich_ml_metal.immich.release import release, state_folder

    try:
        if not Records.load(state_folder(settings)).paused:
            return
        with closing(connect(settings.immich_url, settings.immich_api_key)) as api:
            done = release(api, state_folder(settings), everything=False)
    except ServiceError as exc:
        print_error(f"Immich's queues may still be paused: {exc}")
        typer.echo("Resume them later: immich-ml-metal immich release, or in Immich under Jobs.")
        raise typer.Exit(Exit.FINDING) from exc
    if done.resumed:
        typer.echo(f"Immich's queues go on: {', '.join(done.resumed)}")


def _follow(files: list[Path]) -> None:
    from immich_ml_metal.service.log_files import new_text

    seen = {file: file.stat().st_size for file in files}
    while True:
        for file in files:
            text, seen[file] = new_text(file, seen[file])
            if text:
                typer.echo(text, nl=False)
        time.sleep(0.5)


def _plan(settings: "Settings", config: Path | None) -> "ServicePlan":
    import sys

    from immich_ml_metal.service.log_files import log_folder
    from immich_ml_metal.service.plan import find_program, make_plan

    command = find_program(sys.argv[0])
    return make_plan(settings, command, log_folder(), config_file=config)


def _manager(*, daemon: bool) -> "Manager":
    from immich_ml_metal.service.choose import choose_manager
    from immich_ml_metal.system.programs import run_program

    return choose_manager(run_program, daemon=daemon)


def _installed(*, daemon: bool) -> "Manager":
    manager = _manager(daemon=daemon)
    if not manager.definition.exists():
        print_error("not installed; run: immich-ml-metal service install")
        raise typer.Exit(Exit.FINDING)
    return manager


def _state_words(state: str, pid: int | None, last_exit: str) -> str:
    if state == "running":
        return f"running, process {pid}"
    if state == "none":
        return "not installed (immich-ml-metal service install)"
    return f"stopped{f', it ended with {last_exit}' if last_exit else ''}"


def _serving_words(url: str, serving: str | None) -> str:
    if serving is None:
        return f"nothing answers at {url}"
    if serving == __version__:
        return f"{url} answers: version {serving}"
    old = f"version {serving or 'unknown'} is still serving, {__version__} is installed"
    return f"{url} answers: {old}\n  immich-ml-metal service restart"
