"""`demo`: one picture and one text through every task, told as a person would want to read it."""

import io
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image, ImageDraw
from rich.console import Console

from immich_ml_metal.cli.output import Exit, FolderOption, own_command, print_error
from immich_ml_metal.client.calls import (
    CLIP_IMAGE,
    CLIP_TEXT,
    FACES,
    TEXT,
    FaceAnswer,
    ImmichClient,
    TextAnswer,
    Timed,
    configured_names,
    immich_calls,
)
from immich_ml_metal.client.own_service import running_service
from immich_ml_metal.drawing import draw_preview
from immich_ml_metal.models.store import ModelStore
from immich_ml_metal.settings import Settings
from immich_ml_metal.settings_sources import load_settings
from immich_ml_metal.system.owner import write_whole
from immich_ml_metal.tasks.images import ImageLimits, decode

QUERIES = ("a portrait of a person", "a plate of spaghetti", "a sign with text on it")
_TIMEOUT_S = 600.0  # with --pull, the first answer waits for a download
_FACE_COLOUR, _TEXT_COLOUR = (255, 196, 0), (0, 90, 255)
Picture = Annotated[
    Path | None,
    typer.Argument(
        exists=True, dir_okay=False, help="A picture of yours; one drawn by the project if none."
    ),
]
Output = Annotated[
    Path, typer.Option(dir_okay=False, help="Where to save the picture with its boxes.")
]
Pull = Annotated[bool, typer.Option("--pull", help="Download the models that are missing.")]


def demo(
    picture: Picture = None,
    output: Output = Path("demo-output/demo.png"),
    models_dir: FolderOption = None,
    pull: Pull = False,
) -> None:
    """Show what the service answers: search, faces and text of one picture."""
    settings = load_settings({"models_dir": models_dir})
    image = picture.read_bytes() if picture is not None else draw_preview(seed=1)
    options = {"--models-dir": str(settings.models_dir), "--log-level": "warning"}
    options["--no-gateway"] = ""  # here a download that fails is to be told, not waited out
    with running_service(options) as own:
        is_shown = show_demo(settings, own.url, image, output, Console(highlight=False), pull=pull)
    if not is_shown:
        print_error("nothing could be shown: no model is here; --pull fetches what is missing")
        raise typer.Exit(Exit.FINDING)


def show_demo(
    settings: Settings, url: str, image: bytes, output: Path, console: Console, *, pull: bool
) -> bool:
    """Ask the service at `url` what it has models for, print, draw; whether there was anything."""
    boxes: list[int] = []
    calls, store = immich_calls(configured_names(settings)), ModelStore(settings)
    canvas = decode(image, ImageLimits()).image.copy()
    console.print(f"Asking {url} about a picture of {canvas.width}x{canvas.height} pixels\n")
    with closing(ImmichClient(url, configured_names(settings), timeout_s=_TIMEOUT_S)) as client:
        asked = _Asked(client, image, canvas, console)
        for title, needed, show in (
            ("Search", (CLIP_IMAGE, CLIP_TEXT), asked.show_search),
            ("Faces", (FACES,), asked.show_faces),
            ("Text", (TEXT,), asked.show_text),
        ):
            console.print(f"[bold]{title}[/]")
            missing = [key.name for name in needed for key in calls[name].missing(store)]
            if missing and not pull:
                console.print(f"  not shown: {missing[0]} is not in {settings.models_dir}")
                console.print(f"  get it with: {own_command()} models pull {missing[0]}")
            else:
                boxes.append(show())
            console.print()
    if sum(boxes):
        drawn = io.BytesIO()
        canvas.save(drawn, Image.registered_extensions().get(output.suffix.lower(), "PNG"))
        write_whole(output, drawn.getvalue())
        console.print(f"{sum(boxes)} boxes drawn in [bold]{output}[/]")
    return bool(boxes)


@dataclass(frozen=True, slots=True)
class _Asked:
    """Asks about one picture, prints the answers and draws them onto `canvas`."""

    client: ImmichClient
    image: bytes
    canvas: Image.Image
    console: Console

    def _ask(self, name: str, payload: bytes | str) -> Timed:
        self.client.ask(name, payload)  # loads the model
        return self.client.ask(name, payload)

    def show_search(self) -> int:
        asked = self._ask(CLIP_IMAGE, self.image)
        picture = asked.answer
        self.console.print(f"  picture → {picture.size} numbers in {_ms(asked)}")
        for query in QUERIES:
            asked = self._ask(CLIP_TEXT, query)
            self.console.print(f"  {float(picture @ asked.answer):6.3f}  {query!r} ({_ms(asked)})")
        return 0

    def show_faces(self) -> int:
        asked = self._ask(FACES, self.image)
        faces: FaceAnswer = asked.answer
        self.console.print(f"  {len(faces.boxes)} found in {_ms(asked)}")
        draw = ImageDraw.Draw(self.canvas)
        for box, score in zip(faces.boxes.tolist(), faces.scores, strict=True):
            draw.rectangle(box, outline=_FACE_COLOUR, width=self._line_width())
            sides = ", ".join(f"{side:.1f}" for side in box)
            self.console.print(f"  score {score:.2f} at [{sides}] px", markup=False)
        return len(faces.boxes)

    def show_text(self) -> int:
        asked = self._ask(TEXT, self.image)
        text: TextAnswer = asked.answer
        self.console.print(f"  {len(text.lines)} lines read in {_ms(asked)}")
        draw = ImageDraw.Draw(self.canvas)
        for line, corners, score in zip(text.lines, text.corners, text.scores, strict=True):
            points = [tuple(point) for point in (corners * self.canvas.size).tolist()]
            draw.polygon(points, outline=_TEXT_COLOUR, width=self._line_width())
            self.console.print(f"  {score:.2f}  {line}", markup=False)
        return len(text.lines)

    def _line_width(self) -> int:
        return max(2, min(self.canvas.size) // 300)


def _ms(asked: Timed) -> str:
    return f"{1000 * asked.seconds:.0f} ms"
