"""`bench`: the service under load, beside the raw engine, in one run.

Speed is told as ratios made in the same minutes on the same machine; absolute numbers move.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from immich_ml_metal.cli.json_output import JsonOption, print_json

CLIENTS = (1, 2, 8)


def bench(
    photos: Annotated[
        list[Path] | None,
        typer.Argument(help="Pictures or folders of pictures; drawn ones when none are named."),
    ] = None,
    models_dir: Annotated[Path | None, typer.Option(help="Model folder.")] = None,
    clip_model: Annotated[str | None, typer.Option(help="CLIP model.")] = None,
    face_model: Annotated[str | None, typer.Option(help="Face model.")] = None,
    ocr_model: Annotated[str | None, typer.Option(help="Text model.")] = None,
    seconds: Annotated[float, typer.Option(min=0.5, help="Length of each measurement.")] = 6.0,
    against: Annotated[str | None, typer.Option(help="A second service to measure too.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure requests per second, latency and memory; compare with the raw engine."""
    from rich.console import Console

    from immich_ml_metal.bench.report import render
    from immich_ml_metal.bench.run import measure_all
    from immich_ml_metal.settings_sources import load_settings

    settings = load_settings(
        {
            "models_dir": models_dir,
            "clip_model": clip_model,
            "face_model": face_model,
            "ocr_model": ocr_model,
        }
    )
    console = Console(stderr=as_json)
    result = measure_all(
        settings,
        photos=photos or [],
        clients=CLIENTS,
        seconds=seconds,
        against=against,
        say=lambda line: console.print(line, style="dim"),
    )
    if as_json:
        print_json(asdict(result))
    else:
        render(result, console)
