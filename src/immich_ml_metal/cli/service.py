"""`service ...`: start at boot, stop, see, read the logs."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from immich_ml_metal import __version__
from immich_ml_metal.cli.config import render_toml, write_private
from immich_ml_metal.cli.output import Exit, JsonOption, print_json
from immich_ml_metal.errors import ServiceError
from immich_ml_metal.setting_kinds import hide_passwords
from immich_ml_metal.settings import SECRET

if TYPE_CHECKING:
    from immich_ml_metal.service.plan import Manager, ServicePlan
    from immich_ml_metal.settings import Settings
    from immich_ml_metal.settings_sources import Resolved

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
    env_file: Annotated[Path | None, typer.Option(help="An Immich .env file.")] = None,
    show: Annotated[bool, typer.Option("--print", help="Show it; change nothing.")] = False,
) -> None:
    """Start the service now and at every boot; run it again after an upgrade."""
    from immich_ml_metal.settings_sources import resolve

    resolved = resolve(env_file=env_file)
    settings = resolved.settings
    file, content = _in_force(resolved)
    manager = _manager(daemon=daemon)
    plan = _plan(settings, file, None)
    text = manager.render(plan)
    if problem := manager.validate(text):
        typer.echo(f"immich-ml-metal: {problem}", err=True)
        raise typer.Exit(Exit.FINDING)
    if content:
        typer.echo(f"# {file}: what is set now\n{_shown(content)}")
    if show:
        typer.echo(f"# {manager.definition}\n{text}")
        return
    _warn_of_privacy(settings, file)
    with _undone_on_failure(manager, file if content else None):
        if file is not None and content:
            write_private(file, content)
        manager.install(plan)
    _tell_installed(manager, plan)
    _explain(daemon=daemon)


def _tell_installed(manager: "Manager", plan: "ServicePlan") -> None:
    typer.echo(f"Wrote {manager.definition}")
    typer.echo(f"It runs {' '.join(plan.command)}, now and at every boot.")
    typer.echo(f"Logs: {plan.log_file}")


def _in_force(resolved: "Resolved") -> tuple[Path | None, str]:
    """The settings file of the service, and its new content where the environment adds to it."""
    from immich_ml_metal.settings_sources import DEFAULT_FILE, settings_file

    file = settings_file()
    kept = ("default", str(file))
    if all(source in kept for source in resolved.origin.values()):
        return file, ""
    return file or DEFAULT_FILE.expanduser(), render_toml(resolved)


def _shown(content: str) -> str:
    """The lines that set something, secrets and passwords blotted out."""
    lines = [line for line in content.splitlines() if line and not line.startswith("#")]
    secret = [f"{name} =" for name in SECRET]
    return "\n".join(
        f"{line.partition('=')[0]}= ***" if line.startswith(tuple(secret)) else hide_passwords(line)
        for line in lines
    )


@contextmanager
def _undone_on_failure(manager: "Manager", file: Path | None) -> Iterator[None]:
    """Put both files back as they were when the body fails; a unit that was not there goes."""
    touched = [manager.definition, *([file] if file else [])]
    before = {path: path.read_bytes() if path.exists() else None for path in touched}
    try:
        yield
    except (ServiceError, OSError):
        with suppress(ServiceError, OSError):
            if before[manager.definition] is None:
                manager.uninstall()
        for path, content in before.items():
            if content is not None:
                path.write_bytes(content)
            else:
                path.unlink(missing_ok=True)
        raise


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
def uninstall(daemon: DaemonOption = False) -> None:
    """Stop the service and forget it. Models, settings and logs stay."""
    manager = _manager(daemon=daemon)
    manager.uninstall()
    typer.echo(f"Removed {manager.definition}")
    _release()


@app.command("start")
def start(daemon: DaemonOption = False) -> None:
    """Start the installed service."""
    _installed(daemon=daemon).start()
    typer.echo("Started.")


@app.command("stop")
def stop(daemon: DaemonOption = False) -> None:
    """Stop it, once what is in flight is answered, until the next start or boot."""
    from immich_ml_metal.immich.release import paused_by_us
    from immich_ml_metal.settings_sources import load_settings

    _installed(daemon=daemon).stop()
    typer.echo("Stopped.")
    if queues := paused_by_us(load_settings()):
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
    from immich_ml_metal.settings_sources import load_settings

    url = local_url(load_settings())
    state = _manager(daemon=daemon).status()
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
) -> None:
    """Print the end of the logs: gateway, worker, and what could not be logged."""
    from immich_ml_metal.logs import file_of
    from immich_ml_metal.service.log_files import tail
    from immich_ml_metal.settings_sources import load_settings

    plan = _plan(load_settings(), None, None)
    files = [plan.log_file, file_of(plan.log_file, "worker"), plan.stderr_file]
    present = [file for file in files if file.is_file()]
    if not present:
        typer.echo(f"immich-ml-metal: no log yet at {plan.log_file}", err=True)
        raise typer.Exit(Exit.FINDING)
    for file in present:
        typer.echo(f"==> {file} <==")
        typer.echo("\n".join(tail(file, lines)))
    if follow:
        _follow(present)


def _release() -> None:
    """Nobody of ours comes back: let Immich's queues go on, or say how."""
    from contextlib import closing

    from immich_ml_metal.errors import ServiceError
    from immich_ml_metal.immich.api import connect
    from immich_ml_metal.immich.records import Records
    from immich_ml_metal.immich.release import release, state_folder
    from immich_ml_metal.settings_sources import load_settings

    try:
        settings = load_settings()
        if not Records.load(state_folder(settings)).paused:
            return
        with closing(connect(settings.immich_url, settings.immich_api_key)) as api:
            done = release(api, state_folder(settings), everything=False)
    except ServiceError as exc:
        typer.echo(f"immich-ml-metal: Immich's queues may still be paused: {exc}", err=True)
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


def _plan(settings: "Settings", config: Path | None, env_file: Path | None) -> "ServicePlan":
    import sys

    from immich_ml_metal.service.log_files import log_folder
    from immich_ml_metal.service.plan import find_program, make_plan

    command = find_program(sys.argv[0])
    return make_plan(settings, command, log_folder(), config_file=config, env_file=env_file)


def _manager(*, daemon: bool) -> "Manager":
    from immich_ml_metal.service.choose import choose_manager
    from immich_ml_metal.system.programs import run_program

    return choose_manager(run_program, daemon=daemon)


def _installed(*, daemon: bool) -> "Manager":
    manager = _manager(daemon=daemon)
    if not manager.definition.exists():
        typer.echo("immich-ml-metal: not installed; run: immich-ml-metal service install", err=True)
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


def _explain(*, daemon: bool) -> None:
    import platform

    if platform.system() == "Linux":
        typer.echo("To run without being logged in: loginctl enable-linger")
    elif not daemon:
        typer.echo("It starts when you log in. For a Mac that nobody logs in to: --daemon.")
