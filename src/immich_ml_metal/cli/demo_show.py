"""What `demo` asks, prints and draws."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image, ImageDraw
from rich.console import Console

from immich_ml_metal.client.calls import Call, checked, standard_calls
from immich_ml_metal.models.store import ModelStore
from immich_ml_metal.settings import Settings
from immich_ml_metal.tasks.images import ImageLimits, decode
from immich_ml_metal.types import Task

QUERIES = ("a portrait of a person", "a plate of spaghetti", "a sign with text on it")
_TIMEOUT_S = 600.0  # with --pull, the first answer waits for a download
_FACE_COLOUR, _TEXT_COLOUR = (255, 196, 0), (0, 90, 255)


@dataclass(frozen=True, slots=True)
class _Asked:
    """One answer, and how long it took the second time, when the model was loaded."""

    body: dict[str, Any]
    milliseconds: float


def show_demo(
    settings: Settings, url: str, image: bytes, output: Path, console: Console, *, pull: bool
) -> None:
    """Ask the service at `url` everything it has models for; print the answers, draw the boxes."""
    calls = standard_calls(settings)
    store = ModelStore(settings)
    canvas = decode(image, ImageLimits()).image.copy()
    console.print(f"Asking {url} about a picture of {canvas.width}x{canvas.height} pixels\n")
    for title, needed, show in (
        ("Search", ("clip image", "clip text"), _show_search),
        ("Faces", ("faces",), _show_faces),
        ("Text", ("text",), _show_text),
    ):
        console.print(f"[bold]{title}[/]")
        missing = [key.name for name in needed for key in calls[name].missing(store)]
        if missing and not pull:
            console.print(
                f"  not shown: {missing[0]} is not in {settings.models_dir}\n"
                f"  get it with: immich-ml-metal models pull {missing[0]}\n"
            )
            continue
        show(calls, url, image, canvas, console)
        console.print()
    output.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(output)
    console.print(f"Boxes drawn in [bold]{output}[/]")


def _ask(url: str, call: Call, *, image: bytes | None = None, text: str | None = None) -> _Asked:
    form = call.form(image=image, text=text)
    for attempt in range(2):  # the first one loads the model
        started = time.perf_counter()
        with checked(url):
            answer = httpx.post(f"{url}/predict", timeout=_TIMEOUT_S, **form).raise_for_status()
        elapsed_ms = 1000 * (time.perf_counter() - started)
        if attempt:
            return _Asked(answer.json(), elapsed_ms)
    raise AssertionError


def _show_search(
    calls: dict[str, Call], url: str, image: bytes, canvas: Image.Image, console: Console
) -> None:
    asked = _ask(url, calls["clip image"], image=image)
    picture = np.array(json.loads(asked.body[Task.CLIP]))
    console.print(f"  picture → {picture.size} numbers in {asked.milliseconds:.0f} ms")
    for query in QUERIES:
        asked = _ask(url, calls["clip text"], text=query)
        words = np.array(json.loads(asked.body[Task.CLIP]))
        console.print(f"  {float(picture @ words):6.3f}  {query!r} ({asked.milliseconds:.0f} ms)")


def _show_faces(
    calls: dict[str, Call], url: str, image: bytes, canvas: Image.Image, console: Console
) -> None:
    asked = _ask(url, calls["faces"], image=image)
    faces = asked.body[Task.FACES]
    console.print(f"  {len(faces)} found in {asked.milliseconds:.0f} ms")
    draw = ImageDraw.Draw(canvas)
    for face in faces:
        box = [face["boundingBox"][side] for side in ("x1", "y1", "x2", "y2")]
        draw.rectangle(box, outline=_FACE_COLOUR, width=_line_width(canvas))
        console.print(f"  score {face['score']:.2f} at {box} px")


def _show_text(
    calls: dict[str, Call], url: str, image: bytes, canvas: Image.Image, console: Console
) -> None:
    asked = _ask(url, calls["text"], image=image)
    text = asked.body[Task.OCR]
    console.print(f"  {len(text['text'])} lines read in {asked.milliseconds:.0f} ms")
    draw = ImageDraw.Draw(canvas)
    for row, line in enumerate(text["text"]):
        corners = _corners(text["box"][8 * row : 8 * row + 8], canvas.size)
        draw.polygon(corners, outline=_TEXT_COLOUR, width=_line_width(canvas))
        console.print(f"  {text['textScore'][row]:.2f}  {line}", markup=False)


def _corners(box: Sequence[float], size: tuple[int, int]) -> list[tuple[float, float]]:
    """Eight numbers in 0..1 → four corners in pixels."""
    return [(box[i] * size[0], box[i + 1] * size[1]) for i in range(0, 8, 2)]


def _line_width(canvas: Image.Image) -> int:
    return max(2, min(canvas.size) // 300)
