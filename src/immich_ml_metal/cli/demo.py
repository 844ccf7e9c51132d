"""`demo`: one picture and one text through every task, told as a person would want to read it."""

from pathlib import Path
from typing import Annotated

import typer


def demo(
    picture: Annotated[
        Path | None,
        typer.Argument(
            exists=True,
            dir_okay=False,
            help="A picture of yours; one drawn by the project if none.",
        ),
    ] = None,
    output: Annotated[Path, typer.Option(help="Where to save the picture with its boxes.")] = Path(
        "demo-output/demo.png"
    ),
    models_dir: Annotated[Path | None, typer.Option(help="Model folder.")] = None,
    pull: Annotated[
        bool, typer.Option("--pull", help="Download the models that are missing.")
    ] = False,
) -> None:
    """Show what the service answers: search, faces and text of one picture."""
    from rich.console import Console

    from immich_ml_metal.cli.demo_show import show_demo
    from immich_ml_metal.client.child import running_service
    from immich_ml_metal.client.drawing import draw_preview
    from immich_ml_metal.settings_sources import load_settings

    settings = load_settings({"models_dir": models_dir})
    image = picture.read_bytes() if picture is not None else draw_preview(seed=1)
    console = Console()
    options = {"--models-dir": str(settings.models_dir), "--log-level": "warning"}
    options["--no-gateway"] = ""  # here a download that fails is to be told, not waited out
    with running_service(options) as child:
        show_demo(settings, child.url, image, output, console, pull=pull)
