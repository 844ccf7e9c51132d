"""The command line: `immich-ml-metal COMMAND`.

Command modules import only typer at the top; what a command needs is imported inside it, so that
`serve` starts fast and `--help` never loads a model library.
"""

import sys

import typer

from immich_ml_metal import __version__
from immich_ml_metal.cli import config, immich
from immich_ml_metal.cli.parity import parity
from immich_ml_metal.errors import ConfigError

app = typer.Typer(
    name="immich-ml-metal",
    help="Drop-in machine-learning service for Immich: native on Apple Silicon.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(config.app, name="config")
app.add_typer(immich.app, name="immich")
app.command()(parity)


@app.callback()
def root() -> None:
    """Drop-in machine-learning service for Immich: native on Apple Silicon."""


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(f"immich-ml-metal {__version__}")


def main() -> None:
    """Run the command line; a bad setting ends with its reason and exit code 2."""
    try:
        app()
    except ConfigError as exc:
        typer.echo(f"immich-ml-metal: {exc}", err=True)
        sys.exit(2)
