"""The command line: `immich-ml-metal COMMAND`.

Command modules import only typer at the top; what a command needs is imported inside it, so that
`serve` starts fast and `--help` never loads a model library.
"""

import sys

import typer

from immich_ml_metal import __version__
from immich_ml_metal.cli import config, immich, models, service
from immich_ml_metal.cli.bench import bench
from immich_ml_metal.cli.demo import demo
from immich_ml_metal.cli.doctor import doctor
from immich_ml_metal.cli.exits import Exit
from immich_ml_metal.cli.parity import parity
from immich_ml_metal.cli.serve import serve
from immich_ml_metal.errors import ConfigError, ServiceError

app = typer.Typer(
    name="immich-ml-metal",
    help="Drop-in machine-learning service for Immich: native on Apple Silicon.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command("serve")(serve)
app.command("demo")(demo)
app.command("bench")(bench)
app.add_typer(config.app, name="config")
app.add_typer(models.app, name="models")
app.add_typer(immich.app, name="immich")
app.add_typer(service.app, name="service")
app.command("doctor")(doctor)
app.command("parity")(parity)


@app.callback()
def root() -> None:
    """Drop-in machine-learning service for Immich: native on Apple Silicon."""


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(f"immich-ml-metal {__version__}")


def main() -> None:
    """Run the command line; a deliberate failure ends with its reason, not with a traceback."""
    try:
        app()
    except ServiceError as exc:
        typer.echo(f"immich-ml-metal: {exc}", err=True)
        sys.exit(Exit.USAGE if isinstance(exc, ConfigError) else Exit.FINDING)
