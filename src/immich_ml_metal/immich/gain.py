"""Measure on this machine what a higher job concurrency in Immich would give."""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

from immich_ml_metal.immich.advice import GOOD_CONCURRENCY
from immich_ml_metal.immich.api import ServerSettings
from immich_ml_metal.parity.client import ModelNames, Refused, Service
from immich_ml_metal.types import Task

PICTURES = 8
ROUNDS = 2
TURNS = 2  # a machine busy with something else for a moment must not decide


def measure_gains(
    url: str, server: ServerSettings, draw: Callable[[int], bytes]
) -> Mapping[Task, float]:
    """Throughput at `GOOD_CONCURRENCY` over that at Immich's setting, by task.

    A task that does not answer is left out: there is nothing to measure.

    Args:
        url: of our service.
        server: names the models and the concurrency now.
        draw: a picture like Immich's previews, another one for each number.
    """
    names = ModelNames(
        clip=server.models.get(Task.CLIP, ""),
        faces=server.models.get(Task.FACES, ""),
        ocr=server.models.get(Task.OCR, ""),
    )
    gains = {}
    pictures = [draw(seed) for seed in range(PICTURES)]
    with closing(Service(url, names)) as service:
        asks = {
            Task.CLIP: service.embed_image,
            Task.FACES: service.find_faces,
            Task.OCR: service.read_text,
        }
        for task in server.models:
            low, high = server.concurrency.get(task, 1), GOOD_CONCURRENCY[task]
            try:
                asks[task](pictures[0])  # loads the model
                gains[task] = _gain(asks[task], pictures, low, high)
            except Refused:
                continue
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
