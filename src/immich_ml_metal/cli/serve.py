"""`serve`: run the service until it is told to stop."""

import logging
from pathlib import Path
from typing import Annotated

import typer

from immich_ml_metal.cli.output import EnvFileOption
from immich_ml_metal.logs import configure_logging
from immich_ml_metal.settings_sources import resolve
from immich_ml_metal.system.network_settings import network_troubles

log = logging.getLogger(__name__)

Host = Annotated[str | None, typer.Option(help="Address to listen on.")]
Port = Annotated[int | None, typer.Option(help="TCP port; 0 picks one.")]
Folder = Annotated[Path | None, typer.Option(help="Model folder, as Immich's.")]
LogLevel = Annotated[str | None, typer.Option(help="error, warning, info or debug.")]
Gateway = Annotated[
    bool,
    typer.Option(
        "--gateway/--no-gateway",
        help="Hold requests in a small process before the worker, or run it alone: to debug, as "
        "nothing is held or sent again then, and heads, slow senders, connections have no limit.",
    ),
]

# For the services that other commands start: what those answer is in nobody's index.
IndexGuardOption = Annotated[str | None, typer.Option("--index-guard", hidden=True)]


def serve(
    host: Host = None,
    port: Port = None,
    models_dir: Folder = None,
    log_level: LogLevel = None,
    env_file: EnvFileOption = None,
    gateway: Gateway = True,
    index_guard: IndexGuardOption = None,
) -> None:
    """Answer Immich's requests on port 3003."""
    given = {"host": host, "port": port, "models_dir": models_dir, "log_level": log_level}
    given["index_guard"] = index_guard
    settings, _, warnings = resolve(given, env_file=env_file)
    configure_logging(settings, "gateway" if gateway else "worker")
    for warning in [*warnings, *network_troubles()]:
        log.warning("%s", warning)
    if gateway:  # one process must not load what only the other needs
        from immich_ml_metal.gateway import serving

        serving.run(settings)
    else:
        from immich_ml_metal.worker import process

        process.run(settings)
