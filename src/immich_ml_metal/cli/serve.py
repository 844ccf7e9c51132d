"""`serve`: run the service until it is told to stop."""

import logging
from pathlib import Path
from typing import Annotated

import typer

log = logging.getLogger(__name__)


def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="TCP port; 0 picks one.")] = None,
    models_dir: Annotated[Path | None, typer.Option(help="Model folder, as Immich's.")] = None,
    log_level: Annotated[str | None, typer.Option(help="error, warning, info or debug.")] = None,
    config: Annotated[Path | None, typer.Option(help="Settings file (TOML).")] = None,
    env_file: Annotated[Path | None, typer.Option(help="An Immich .env file.")] = None,
    gateway: Annotated[
        bool,
        typer.Option(
            "--gateway/--no-gateway",
            help="Hold requests in a small process before the worker, or run it alone.",
        ),
    ] = True,
) -> None:
    """Answer Immich's requests on port 3003."""
    from immich_ml_metal.logs import configure_logging
    from immich_ml_metal.settings_sources import doubtful_names, resolve

    settings, origin = resolve(
        {"host": host, "port": port, "models_dir": models_dir, "log_level": log_level},
        file=config,
        env_file=env_file,
    )
    configure_logging(settings, "gateway" if gateway else "worker")
    for warning in doubtful_names(origin, env_file=env_file):
        log.warning("%s", warning)
    if gateway:
        from immich_ml_metal.gateway import serving

        serving.run(settings)
    else:
        from immich_ml_metal.worker import process as worker

        worker.run(settings)
