"""The command line: `immich-ml-metal COMMAND`.

A command is the module of its name in this package: an `app` with commands of its own, or a
function of that name. It is imported when it runs, in `load_command` and nowhere else, so that
`--help` is quick and `serve` loads nothing that only `doctor` needs.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from types import MappingProxyType
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from immich_ml_metal import __version__
from immich_ml_metal.cli.output import Exit, print_error
from immich_ml_metal.errors import ConfigError, ServiceError

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
    return command


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


@app.callback()
def root() -> None:
    """Drop-in machine-learning service for Immich: native on Apple Silicon."""


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(f"immich-ml-metal {__version__}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; a deliberate failure ends with its reason, not with a traceback.

    Args:
        arguments: those of the process when None.
    """
    try:
        app(arguments, prog_name="immich-ml-metal")
    except ServiceError as exc:
        print_error(exc)
        sys.exit(Exit.USAGE if isinstance(exc, ConfigError) else Exit.FINDING)
