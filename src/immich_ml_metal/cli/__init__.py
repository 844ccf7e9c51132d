"""The command line: `immich-ml-metal COMMAND`.

A command is the module of its name in this package: an `app` with commands of its own, or a
function of that name. It is imported when it runs, in `load_command` and nowhere else, so that
`--help` is quick and `serve` loads nothing that only `doctor` needs.
"""

import sys
import traceback
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup, TyperOption
from typer.main import get_command

from immich_ml_metal import __version__
from immich_ml_metal.cli.ending import (
    close_streams,
    debugging,
    ensure_home,
    exit_code,
    explain,
    open_streams,
)
from immich_ml_metal.cli.output import print_error

# Each command and the first sentence of its own help, in the order of `--help`.
COMMANDS = MappingProxyType(
    {
        "serve": "Answer Immich's requests on port 3003.",
        "demo": "Show what the service answers: search, faces and text of one picture.",
        "doctor": "Check the installation and say what to do, the cause of the trouble first.",
        "config": "Write, show and check the settings.",
        "qualify": "Measure every engine on this machine and choose the fastest that is right.",
        "models": "Get, check, keep, move and choose models.",
        "service": "Start at boot (launchd on macOS, systemd on Linux), stop, see, read the logs.",
        "immich": "See the Immich server's settings and queues; bring back lost jobs.",
        "parity": "Send the same pictures and texts to two services and say whether switching is "
        "safe.",
        "bench": "Measure each task, an import, searches beside it, processor time and memory.",
    }
)


def load_command(name: str) -> TyperCommand | TyperGroup:
    """Import the module of a command and build the command."""
    module = import_module(f"{__name__}.{name}")
    holder = typer.Typer(add_completion=False)
    holder.callback()(lambda: None)  # else a single command would take the holder's place
    if (group := getattr(module, "app", None)) is not None:
        holder.add_typer(group, name=name)
    else:
        holder.command(name)(getattr(module, name))
    command: TyperCommand | TyperGroup = get_command(holder).commands[name]  # type: ignore[attr-defined]
    for leaf in _leaves(command):
        leaf.params.append(_config_option())
    return command


def _leaves(command: Any) -> Iterator[Any]:
    """The commands that do something. Any: Typer's own copies of click's classes."""
    for inner in getattr(command, "commands", {}).values():
        yield from _leaves(inner)
    if not hasattr(command, "commands"):
        yield command


def _config_option() -> Any:
    """`--config`, the same on every command."""
    holder = typer.Typer(add_completion=False)

    @holder.command()
    def lend(config: ConfigOption = None) -> None:
        """Never run: its option is taken."""

    return get_command(holder).params[0]


def _use_config(context: typer.Context, path: Path | None) -> None:
    """For the command, and what it starts, the file is as if `ML_CONFIG_FILE` named it."""
    from immich_ml_metal.settings_sources import named_file, variables_of_file

    if path is not None:
        context.with_resource(named_file(path))
    context.with_resource(variables_of_file())


ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        callback=_use_config,
        expose_value=False,
        readable=False,
        help="Settings file (TOML); else ML_CONFIG_FILE's, or the one `config init` wrote.",
    ),
]


def _shown_type(option: TyperOption, ctx: Any) -> str | None:
    """The kind of value an option takes; a switch takes none, and Typer 0.29 says `<bool>`."""
    return None if option.is_flag else _typers_own(option, ctx)


_typers_own = TyperOption.display_type_rich
TyperOption.display_type_rich = _shown_type  # type: ignore[method-assign, assignment]


class _Delayed(TyperCommand):
    """Stands for a command in the list, and becomes it when it runs or explains itself."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any
    ) -> Any:
        return load_command(str(self.name)).make_context(info_name, args, parent, **extra)


class _Commands(TyperGroup):
    """The group of all commands."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        own = dict(self.commands)
        self.commands.clear()
        for name, summary in COMMANDS.items():
            self.add_command(_Delayed(name=name, help=summary))
        self.commands.update(own)


app = typer.Typer(
    name="immich-ml-metal",
    cls=_Commands,
    help="Drop-in machine-learning service for Immich: native on Apple Silicon.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        version()
        raise typer.Exit


VersionOption = Annotated[
    bool,
    typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version."),
]


@app.callback()
def root(show_version: VersionOption = False) -> None:
    """Drop-in machine-learning service for Immich: native on Apple Silicon."""


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(f"immich-ml-metal {__version__}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; whatever happens, it ends with a line and an exit code.

    Args:
        arguments: those of the process when None.
    """
    open_streams()
    ensure_home()
    try:
        app(arguments, prog_name="immich-ml-metal")
    except SystemExit as end:
        sys.exit(close_streams(end.code))
    except Exception as exc:  # noqa: BLE001 - the last line of the process
        print_error(explain(exc))
        if debugging():
            traceback.print_exc()
        sys.exit(close_streams(exit_code(exc)))
