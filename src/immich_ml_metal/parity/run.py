"""Put the same pictures and texts to two services, one after the other, and compare."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from operator import methodcaller
from pathlib import Path
from typing import Protocol

from immich_ml_metal.parity.client import Refused, Timed
from immich_ml_metal.parity.compare import (
    Comparison,
    cosine,
    face_agreement,
    line_agreement,
    match_faces,
)

TASKS = ("clip image", "clip text", "faces", "text")
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"})
TEXTS = (
    "a dog on the beach",
    "sunset over the mountains",
    "birthday cake with candles",
    "red car",
    "children playing in the snow",
    "Weihnachtsbaum",
    "un chat noir",
    "receipt",
    "a person riding a bicycle through the city at night",
    "東京タワー",
)


class Answering(Protocol):
    """What a comparison needs of a service."""

    def embed_image(self, image: bytes) -> Timed:
        """The picture's search vector."""
        ...

    def embed_text(self, text: str) -> Timed:
        """The text's search vector."""
        ...

    def find_faces(self, image: bytes) -> Timed:
        """The picture's faces."""
        ...

    def read_text(self, image: bytes) -> Timed:
        """The picture's text lines."""
        ...


@dataclass(frozen=True, slots=True)
class Question:
    """One thing to ask both: which task, what about, and how to ask a service."""

    task: str
    subject: str
    ask: Callable[[Answering], Timed]


def find_photos(paths: Iterable[Path]) -> list[Path]:
    """The given files, and the pictures in the given folders, in order and each once."""
    found: dict[Path, None] = {}
    for path in paths:
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in inside:
            if file == path or (file.is_file() and file.suffix.lower() in SUFFIXES):
                found[file] = None
    return list(found)


def questions(
    photos: Iterable[Path], texts: Sequence[str], tasks: Sequence[str]
) -> Iterator[Question]:
    """Everything to ask, one picture at a time."""
    if "clip text" in tasks:
        for text in texts:
            yield Question("clip text", text, methodcaller("embed_text", text))
    for photo in photos:
        image = photo.read_bytes()
        asks: dict[str, Callable[[Answering], Timed]] = {
            "clip image": methodcaller("embed_image", image),
            "faces": methodcaller("find_faces", image),
            "text": methodcaller("read_text", image),
        }
        for task, ask in asks.items():
            if task in tasks:
                yield Question(task, str(photo), ask)


def compare(question: Question, ours: Answering, theirs: Answering) -> Comparison:
    """Ask both and compare; where both refuse, they agree."""
    first, second = _ask(question, ours), _ask(question, theirs)
    if isinstance(first, str) or isinstance(second, str):
        problem = ""
        if not isinstance(second, str):
            problem = f"ours {first}"
        elif not isinstance(first, str):
            problem = f"theirs {second}"
        return Comparison(question.task, question.subject, None, 0, 0, problem=problem)
    return _measure(question, first, second)


def warm_up(first: Iterable[Question], services: Iterable[Answering]) -> None:
    """Ask each task's first question unrecorded, so that loading a model is not timed."""
    seen: set[str] = set()
    services = list(services)
    for question in first:
        if question.task not in seen:
            seen.add(question.task)
            for service in services:
                _ask(question, service)
        if len(seen) == len(TASKS):
            return


def _ask(question: Question, service: Answering) -> Timed | str:
    try:
        return question.ask(service)
    except Refused as exc:
        return str(exc)
    except (KeyError, ValueError, TypeError) as exc:
        return f"answered with something else than Immich expects: {type(exc).__name__}: {exc}"


def _measure(question: Question, ours: Timed, theirs: Timed) -> Comparison:
    measured = partial(
        Comparison, question.task, question.subject, ours_s=ours.seconds, theirs_s=theirs.seconds
    )
    if question.task == "faces":
        match = match_faces(ours.answer, theirs.answer)
        return measured(face_agreement(match), faces=match)
    if question.task == "text":
        lines = tuple(ours.answer), tuple(theirs.answer)
        return measured(line_agreement(*lines), lines=lines)
    return measured(cosine(ours.answer, theirs.answer))
