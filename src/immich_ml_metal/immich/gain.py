"""Measure on this machine what a higher job concurrency in Immich would give."""

import io
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import numpy as np
from PIL import Image

from immich_ml_metal.immich.advice import GOOD_CONCURRENCY
from immich_ml_metal.immich.api import ServerSettings
from immich_ml_metal.parity.client import ModelNames, Refused, Service
from immich_ml_metal.types import Task

ROUNDS = 3  # each worker's share of pictures per measurement
_SIZE_PX = (1920, 1440)  # Immich's preview of a 4:3 photo


def measure_gains(url: str, server: ServerSettings) -> Mapping[Task, float]:
    """Throughput at `GOOD_CONCURRENCY` over that at Immich's setting, by task.

    A task that does not answer is left out: there is nothing to measure.
    """
    names = ModelNames(
        clip=server.models.get(Task.CLIP, ""),
        faces=server.models.get(Task.FACES, ""),
        ocr=server.models.get(Task.OCR, ""),
    )
    gains = {}
    with closing(Service(url, names)) as service:
        asks = {
            Task.CLIP: service.embed_image,
            Task.FACES: service.find_faces,
            Task.OCR: service.read_text,
        }
        for task in server.models:
            low, high = server.concurrency.get(task, 1), GOOD_CONCURRENCY[task]
            try:
                asks[task](_picture(0))  # loads the model
                gains[task] = _rate(asks[task], high) / _rate(asks[task], low)
            except Refused:
                continue
    return gains


def _rate(ask: Callable[[bytes], object], workers: int) -> float:
    """Pictures per second with `workers` in flight; each picture is new, so none is cached."""
    count = ROUNDS * max(GOOD_CONCURRENCY.values())
    pictures: Sequence[bytes] = [_picture(time.monotonic_ns() + k) for k in range(count)]
    started_s = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        for _ in pool.map(ask, pictures):
            pass
    return count / (time.perf_counter() - started_s)


def _picture(seed: int) -> bytes:
    """A soft colour field as a JPEG of a preview's size."""
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(coarse).resize(_SIZE_PX).save(out, "JPEG", quality=80)
    return out.getvalue()
