"""`config init|show|check`: write a commented settings file, show what is in force, validate."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from immich_ml_metal.cli.output import JsonOption, print_json
from immich_ml_metal.settings import SECRET, Settings, env_names, grouped
from immich_ml_metal.settings_sources import doubtful_names, resolve

app = typer.Typer(help="Write, show and check the settings.", no_args_is_help=True)

DEFAULT_FILE = Path("~/.config/immich-ml-metal/config.toml")
_UNITS = {"_s": "seconds", "_bytes": "bytes", "_px": "pixels", "_pixels": "pixels"}

_ALWAYS_SHOWN = ("Service", "Answers")

FileOption = Annotated[
    Path | None, typer.Option("--file", help="Settings file (TOML); ML_CONFIG_FILE names one too.")
]
EnvFileOption = Annotated[
    Path | None, typer.Option("--env-file", help="An Immich .env file to read as well.")
]


def default_file() -> Path | None:
    """The file that `config init` writes, if it is there."""
    path = DEFAULT_FILE.expanduser()
    return path if path.is_file() else None


@app.command("init")
def init(
    path: Annotated[Path, typer.Argument(help="Where to write.")] = DEFAULT_FILE,
    env_file: EnvFileOption = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Write a commented settings file; values set now (environment, --env-file) are written in."""
    path = path.expanduser()
    if path.exists() and not force:
        raise typer.BadParameter(f"{path} exists; --force replaces it")
    text = render_toml(*resolve(env_file=env_file))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o600)  # it may hold the Immich key
    path.write_text(text, encoding="utf-8")
    typer.echo(f"Wrote {path}")
    typer.echo(f"Use it: immich-ml-metal serve --config {path}, or ML_CONFIG_FILE={path}")
    if path == DEFAULT_FILE.expanduser():
        typer.echo("`service` and `doctor` find it there by themselves.")


@app.command("show")
def show(
    file: FileOption = None,
    env_file: EnvFileOption = None,
    everything: Annotated[bool, typer.Option("--all", help="Show every setting.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Print the settings in force and where each came from: what matters most, and what is set.

    As JSON, every setting.
    """
    settings, origin = resolve(file=file, env_file=env_file)
    if as_json:
        rows = {
            name: {"value": plain_value(settings, name), "from": origin[name]} for name in origin
        }
        print_json(rows)
        return
    _print_table(settings, origin, everything=everything)


@app.command("check")
def check(file: FileOption = None, env_file: EnvFileOption = None) -> None:
    """Validate the settings; exit 2 and name the setting when one is wrong."""
    _, origin = resolve(file=file, env_file=env_file)
    for warning in doubtful_names(origin, env_file=env_file):
        typer.echo(warning)
    typer.echo("The settings are valid.")


def render_toml(settings: Settings, origin: dict[str, str]) -> str:
    """A settings file with every setting explained; those that are not defaults are in force."""
    blocks = ["# Settings of immich-ml-metal. A line that starts with '#' is the default."]
    for name, field in Settings.model_fields.items():
        head = f"# {field.description}"
        unit = next((unit for end, unit in _UNITS.items() if name.endswith(end)), None)
        about = [f"unit: {unit}"] if unit else []
        about.append("environment: " + ", ".join(env_names(field)))
        value = _toml_value(getattr(settings, name))
        line = f"{name} = {value}" if value is not None else f'{name} = ""  # not set'
        commented = origin[name] == "default"
        blocks.append(f"{head}\n# {'; '.join(about)}\n{'# ' if commented else ''}{line}")
    return "\n\n".join(blocks) + "\n"


def _toml_value(value: Any) -> str | None:
    """One value in TOML; None when there is none. A JSON string is a TOML string but for DEL."""
    if value is None:
        return None
    if hasattr(value, "get_secret_value"):
        value = value.get_secret_value()
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    if isinstance(value, tuple):
        return "[" + ", ".join(filter(None, map(_toml_value, value))) + "]"
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")


def plain_value(settings: Settings, name: str) -> Any:
    """A setting's value as JSON can hold it; a secret is only said to be there."""
    value = getattr(settings, name)
    if name in SECRET:
        return "***" if value is not None else None
    return value if isinstance(value, bool | int | float | tuple | None) else str(value)


def _print_table(settings: Settings, origin: dict[str, str], *, everything: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("setting", "value", "from", box=None, header_style="bold")
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
