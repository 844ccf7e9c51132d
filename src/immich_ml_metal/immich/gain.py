"""Measure on this machine what a higher job concurrency in Immich would give."""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from functools import partial

from immich_ml_metal.client.calls import (
    CLIP_IMAGE,
    FACES,
    TEXT,
    BadAnswer,
    ImmichClient,
    ModelNames,
)
from immich_ml_metal.immich.advice import GOOD_CONCURRENCY
from immich_ml_metal.immich.api import ServerSettings
from immich_ml_metal.types import Task

PICTURES = 8
ROUNDS = 2
_CALLS = {Task.CLIP: CLIP_IMAGE, Task.FACES: FACES, Task.OCR: TEXT}
TURNS = 2  # a machine busy with something else for a moment must not decide


def measure_gains(
    url: str, server: ServerSettings, draw: Callable[[int], bytes]
) -> Mapping[str, float]:
    """Throughput at `GOOD_CONCURRENCY` over that at Immich's setting, by task.

    A task that does not answer is left out: there is nothing to measure.

    Args:
        url: of our service.
        server: names the models and the concurrency now.
        draw: a picture like Immich's previews, another one for each number.
    """
    models = server.models
    names = ModelNames(*(models.get(task, "") for task in (Task.CLIP, Task.FACES, Task.OCR)))
    pictures = [draw(seed) for seed in range(PICTURES)]
    gains = {}
    with closing(ImmichClient(url, names)) as client:
        for task in models:
            ask = partial(client.ask, _CALLS[Task(task)])
            low, high = server.concurrency.get(task, 1), GOOD_CONCURRENCY[task]
            with suppress(BadAnswer):
                ask(pictures[0])  # loads the model
                gains[task] = _gain(ask, pictures, low, high)
    return gains


def _gain(ask: Callable[[bytes], object], pictures: Sequence[bytes], low: int, high: int) -> float:
    """The better of two runs at `high` over the better of two at `low`, taken in turns."""
    rates = [(_rate(ask, pictures, low), _rate(ask, pictures, high)) for _ in range(TURNS)]
    return max(rate for _, rate in rates) / max(rate for rate, _ in rates)


def _rate(ask: Callable[[bytes], object], pictures: Sequence[bytes], workers: int) -> float:
    """Pictures per second with `workers` in flight, each picture sent `ROUNDS` times."""
    sent = [picture for _ in range(ROUNDS) for picture in pictures]
    started_s = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        for _ in pool.map(ask, sent):
            pass
    return len(sent) / (time.perf_counter() - started_s)
