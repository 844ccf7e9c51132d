"""This service as Immich could see it: where it listens, what it serves, how it could be faster."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from itertools import cycle
from queue import SimpleQueue
from statistics import median

from immich_ml_metal.catalog import PARTS_OF, find_model
from immich_ml_metal.client.calls import (
    CLIP_IMAGE,
    CLIP_TEXT,
    FACES,
    TEXT,
    BadAnswer,
    ImmichClient,
    ModelNames,
)
from immich_ml_metal.client.own_service import NotServing, ask_health, local_url
from immich_ml_metal.drawing import draw_preview
from immich_ml_metal.errors import UnknownModel
from immich_ml_metal.immich.advice import GOOD_CONCURRENCY, OurSide
from immich_ml_metal.immich.api import ServerSettings
from immich_ml_metal.settings import Settings
from immich_ml_metal.system.network import names_of_this_machine
from immich_ml_metal.types import Part, Task

PICTURES = 8
ANSWERS = 16  # that one rate is told from
TURNS = 2  # a machine busy with something else for a moment must not decide
SEARCHES = 8
_CALLS = {Task.CLIP: CLIP_IMAGE, Task.FACES: FACES, Task.OCR: TEXT}

Draw = Callable[[int], bytes]


def look_at_ours(settings: Settings, server: ServerSettings, *, measure: bool) -> OurSide:
    """Describe this service; `measure` takes a minute."""
    url = local_url(settings)
    return OurSide(
        port=settings.port,
        hosts=names_of_this_machine(),
        immich_compat=settings.immich_compat,
        why_not_served=_why_not_served,
        engines=_engines(url),
        gains=measure_gains(url, server, draw_preview) if measure else None,
        search_s=measure_search_delay(url, server, draw_preview) if measure else None,
        squashes=_squashes,
        immich_url=settings.immich_url or "",
    )


def _squashes(name: str) -> bool:
    try:
        return find_model(name, Task.CLIP, Part.VISUAL).resize_mode == "squash"
    except UnknownModel:
        return False


def _engines(url: str) -> dict[str, str]:
    try:
        table = ask_health(url).engines
    except NotServing:
        return {}
    return {task: name for task in Task for key, name in table.items() if key.startswith(task)}


def _why_not_served(task: Task, name: str) -> str:
    try:
        find_model(name, task, PARTS_OF[task][0])
    except UnknownModel as exc:
        return str(exc)
    return ""


def measure_gains(url: str, server: ServerSettings, draw: Draw) -> Mapping[str, float]:
    """Throughput at `GOOD_CONCURRENCY` over that at Immich's setting, by task.

    The better of two runs each, taken in turns. A task that does not answer is left out.

    Args:
        url: of our service.
        server: names the models and the concurrency now.
        draw: a picture like Immich's previews, another one for each number.
    """
    gains = {}
    with _asking(url, server, draw) as (client, pictures):
        for task in server.models:
            low, high = server.concurrency.get(task, 1), GOOD_CONCURRENCY[task]
            with suppress(BadAnswer):
                client.ask(_CALLS[Task(task)], pictures[0])  # loads the model
                rates = [
                    [_rate(client, pictures, task, count) for count in (low, high)]
                    for _ in range(TURNS)
                ]
                gains[task] = max(rate for _, rate in rates) / max(rate for rate, _ in rates)
    return gains


def measure_search_delay(
    url: str, server: ServerSettings, draw: Draw
) -> tuple[float, float] | None:
    """Median seconds of a search beside all queues: as Immich is set, and as advised.

    None when searches are switched off or not answered. Takes what `measure_gains` takes.
    """
    if Task.CLIP not in server.models:
        return None
    now = {task: server.concurrency.get(task, 1) for task in server.models}
    advised = {task: max(count, GOOD_CONCURRENCY[task]) for task, count in now.items()}
    with _asking(url, server, draw) as (client, pictures), suppress(BadAnswer):
        client.ask(CLIP_TEXT, "a search that loads the model")
        return _delay(client, pictures, now), _delay(client, pictures, advised)
    return None


@contextmanager
def _asking(
    url: str, server: ServerSettings, draw: Draw
) -> Iterator[tuple[ImmichClient, list[bytes]]]:
    names = ModelNames(*(server.models.get(task, "") for task in _CALLS))
    with closing(ImmichClient(url, names)) as client:
        yield client, [draw(seed) for seed in range(PICTURES)]


@contextmanager
def _feeding(
    client: ImmichClient, pictures: Sequence[bytes], at_once: Mapping[str, int]
) -> Iterator[SimpleQueue[Exception | None]]:
    """Ask for so many pictures of each task at once, for the length of the block.

    Yields what became of each: None for an answer, else why there is none.
    """
    over, done = threading.Event(), SimpleQueue[Exception | None]()

    def feed(call: str) -> None:
        for picture in cycle(pictures):
            if over.is_set():
                return
            try:
                client.ask(call, picture)
            except Exception as exc:  # noqa: BLE001 - whoever counts answers raises it
                done.put(exc)
            else:
                done.put(None)

    with ExitStack() as ends:
        for task, count in at_once.items():
            for _ in range(count):
                thread = threading.Thread(target=feed, args=(_CALLS[Task(task)],))
                thread.start()
                ends.callback(thread.join)
        ends.callback(over.set)
        yield done


def _rate(client: ImmichClient, pictures: Sequence[bytes], task: str, count: int) -> float:
    """Pictures per second of one task with `count` in flight."""
    started_s = time.perf_counter()
    with _feeding(client, pictures, {task: count}) as done:
        for _ in range(ANSWERS):
            if (failure := done.get()) is not None:
                raise failure
        return ANSWERS / (time.perf_counter() - started_s)


def _delay(client: ImmichClient, pictures: Sequence[bytes], at_once: Mapping[str, int]) -> float:
    """Median seconds of `SEARCHES` searches while `at_once` pictures of each task are asked for."""
    with _feeding(client, pictures, at_once):
        times_s = [client.ask(CLIP_TEXT, f"search {number}").seconds for number in range(SEARCHES)]
    return median(times_s)
