"""`config init|show|check`: write a commented settings file, show what is in force, validate."""

from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from immich_ml_metal.cli.output import EnvFileOption, JsonOption, make_table, print_json
from immich_ml_metal.logs import check_log_file
from immich_ml_metal.setting_kinds import hide_passwords
from immich_ml_metal.settings import SECRET, Settings, grouped
from immich_ml_metal.settings_sources import DEFAULT_FILE, resolve
from immich_ml_metal.settings_text import render
from immich_ml_metal.system.listen import CannotListen, check_address
from immich_ml_metal.system.network_settings import network_troubles
from immich_ml_metal.system.owner import write_whole
from immich_ml_metal.system.paths import at_home

app = typer.Typer(help="Write, show and check the settings.", no_args_is_help=True)

_ALWAYS_SHOWN = ("Service", "Answers")


@app.command("init")
def init(
    path: Annotated[Path, typer.Argument(help="Where to write.")] = DEFAULT_FILE,
    env_file: EnvFileOption = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Write a commented settings file; values set now (environment, --env-file) are written in."""
    path = at_home(path)
    if path.exists() and not force:
        raise typer.BadParameter(f"{path} exists; --force replaces it")
    resolved = resolve(env_file=env_file)
    write_private(path, render(resolved.settings, resolved.set_names()))
    typer.echo(f"Wrote {path}")
    if path == DEFAULT_FILE.expanduser():
        typer.echo("Every command finds it there by itself.")
    else:
        typer.echo(f"Use it with --config {path} at any command, or ML_CONFIG_FILE={path}")


@app.command("show")
def show(
    env_file: EnvFileOption = None,
    everything: Annotated[bool, typer.Option("--all", help="Show every setting.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Print the settings in force and where each came from: what matters most, and what is set.

    As JSON, every setting.
    """
    settings, origin, _ = resolve(env_file=env_file)
    if as_json:
        rows = {
            name: {"value": plain_value(settings, name), "from": origin[name]} for name in origin
        }
        print_json(rows)
        return
    _print_table(settings, origin, everything=everything)


@app.command("check")
def check(env_file: EnvFileOption = None) -> None:
    """Try the settings as `serve` would at its start; exit 2 and name what is wrong."""
    from immich_ml_metal.worker.compose import check_start

    settings, _, warnings = resolve(env_file=env_file)
    for warning in [*warnings, *network_troubles()]:
        typer.echo(warning)
    check_log_file(settings)
    check_start(settings)
    _check_address(settings)
    typer.echo("The settings are valid.")


def _check_address(settings: Settings) -> None:
    """A port that is taken by ourselves, running with these settings, is as it should be."""
    from immich_ml_metal.client.own_service import NotServing, ask_health, local_url

    try:
        check_address(settings.host, settings.port)
    except CannotListen:
        with suppress(NotServing):
            if ask_health(local_url(settings)).version:
                return
        raise


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner may read: it may hold the Immich key."""
    write_whole(path, text.encode(), is_private=True)


def plain_value(settings: Settings, name: str) -> Any:
    """A setting's value as JSON can hold it; a secret is only said to be there."""
    value = getattr(settings, name)
    if name in SECRET:
        return "***" if value is not None else None
    plain = isinstance(value, bool | int | float | tuple | None)
    return value if plain else hide_passwords(str(value))


def _print_table(settings: Settings, origin: dict[str, str], *, everything: bool) -> None:
    from rich.console import Console

    table = make_table("setting", "value", "from")
    hidden = 0
    for group, names in grouped().items():
        shown = [
            name
            for name in names
            if everything or group in _ALWAYS_SHOWN or origin[name] != "default"
        ]
        hidden += len(names) - len(shown)
        if shown:
            table.add_row(f"[bold]{group}[/]")
        for name in shown:
            style = "dim" if origin[name] == "default" else ""
            table.add_row(f"  {name}", _in_words(settings, name), origin[name], style=style)
    console = Console()
    console.print(table)
    if hidden:
        console.print(f"{hidden} more are at their defaults; --all shows them.")


def _in_words(settings: Settings, name: str) -> str:
    value = plain_value(settings, name)
    if value is None:
        return "-"
    return (", ".join(value) or "-") if isinstance(value, tuple) else str(value)
