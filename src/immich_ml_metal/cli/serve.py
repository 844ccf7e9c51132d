"""`serve`: run the service until it is told to stop."""

from pathlib import Path
from typing import Annotated

import typer


def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="TCP port; 0 picks one.")] = None,
    models_dir: Annotated[Path | None, typer.Option(help="Model folder, as Immich's.")] = None,
    log_level: Annotated[str | None, typer.Option(help="error, warning, info or debug.")] = None,
    config: Annotated[Path | None, typer.Option(help="Settings file (TOML).")] = None,
    env_file: Annotated[Path | None, typer.Option(help="An Immich .env file.")] = None,
) -> None:
    """Answer Immich's requests on port 3003."""
    import uvicorn

    from immich_ml_metal.compose import build_app
    from immich_ml_metal.config import load_settings
    from immich_ml_metal.logs import configure_logging

    settings = load_settings(
        {"host": host, "port": port, "models_dir": models_dir, "log_level": log_level},
        file=config,
        env_file=env_file,
    )
    configure_logging(settings, "engine")
    uvicorn.run(
        build_app(settings),
        host=settings.host,
        port=settings.port,
        timeout_keep_alive=int(settings.keepalive_s),
        access_log=False,
        log_config=None,
    )
