"""How long a search takes while an import runs, at Immich's concurrency and at a higher one."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from statistics import median

from immich_ml_metal.client.calls import (
    CLIP_IMAGE,
    CLIP_TEXT,
    FACES,
    TEXT,
    BadAnswer,
    ImmichClient,
    ModelNames,
)
from immich_ml_metal.immich.advice import GOOD_CONCURRENCY
from immich_ml_metal.immich.api import ServerSettings
from immich_ml_metal.types import Task

SEARCHES = 8
PICTURES = 8
_CALLS = {Task.CLIP: CLIP_IMAGE, Task.FACES: FACES, Task.OCR: TEXT}


def measure_search_delay(
    url: str, server: ServerSettings, draw: Callable[[int], bytes]
) -> tuple[float, float] | None:
    """Median seconds of a search beside all queues: as Immich is set, and as advised.

    None when searches are switched off or not answered.

    Args:
        url: of our service.
        server: names the models and the concurrency now.
        draw: a picture like Immich's previews, another one for each number.
    """
    if Task.CLIP not in server.models:
        return None
    names = ModelNames(*(server.models.get(task, "") for task in _CALLS))
    pictures = [draw(seed) for seed in range(PICTURES)]
    now = {task: server.concurrency.get(task, 1) for task in server.models}
    advised = {task: max(count, GOOD_CONCURRENCY[task]) for task, count in now.items()}
    with closing(ImmichClient(url, names)) as client, suppress(BadAnswer):
        client.ask(CLIP_TEXT, "a search that loads the model")
        return _delay(client, pictures, now), _delay(client, pictures, advised)
    return None


def _delay(client: ImmichClient, pictures: Sequence[bytes], at_once: Mapping[str, int]) -> float:
    """Median seconds of `SEARCHES` searches while `at_once` pictures of each task are asked for."""
    over = threading.Event()

    def feed(call: str) -> None:
        number = 0
        while not over.is_set():
            with suppress(BadAnswer):
                client.ask(call, pictures[number % len(pictures)])
            number += 1

    with ExitStack() as ends:
        for task, count in at_once.items():
            for _ in range(count):
                thread = threading.Thread(target=feed, args=(_CALLS[Task(task)],))
                thread.start()
                ends.callback(thread.join)
        ends.callback(over.set)
        return median(_seconds(client, f"search {number}") for number in range(SEARCHES))


def _seconds(client: ImmichClient, text: str) -> float:
    started_s = time.perf_counter()
    client.ask(CLIP_TEXT, text)
    return time.perf_counter() - started_s
