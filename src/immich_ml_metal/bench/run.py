"""What `bench` measures, in order: start, raw engine, each task, a whole import, memory."""

import asyncio
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from immich_ml_metal import __version__
from immich_ml_metal.bench.load import Load, run_load, run_once
from immich_ml_metal.bench.raw import RawRate, raw_rates
from immich_ml_metal.client.calls import Call, encode, read_pictures, standard_calls
from immich_ml_metal.client.child import running_service
from immich_ml_metal.client.drawing import draw_preview
from immich_ml_metal.errors import ModelUnavailable
from immich_ml_metal.models.store import ModelStore
from immich_ml_metal.settings import Settings
from immich_ml_metal.threads import core_count

Say = Callable[[str], None]

QUERIES = (
    "a photo of a dog",
    "sunset over the sea",
    "birthday cake with candles",
    "grandmother in the garden",
    "receipt from the hardware store",
    "two children on a red slide",
    "snow on a mountain road",
    "a cat asleep on a keyboard",
)
IMPORT = ("clip image", "faces", "text")  # what Immich asks of every new photo
DRAWN_PICTURES = 8


@dataclass(slots=True)
class Measured:
    """One service: loads by task, whole imports in photos per second, memory."""

    url: str
    loads: dict[str, list[Load]] = field(default_factory=dict)
    imports: list[Load] = field(default_factory=list)
    first_answer_s: float | None = None
    resident_bytes: int | None = None


@dataclass(slots=True)
class Result:
    """Everything `bench` found, with the machine it was found on."""

    machine: str
    cores: int
    version: str
    pictures: int
    raw: list[RawRate]
    ours: Measured
    against: Measured | None


def measure_all(
    settings: Settings,
    *,
    photos: list[Path],
    clients: Sequence[int],
    seconds: float,
    against: str | None,
    say: Say,
) -> Result:
    """Run every measurement; `say` is told what runs."""
    pictures = read_pictures(photos) or [draw_preview(seed) for seed in range(DRAWN_PICTURES)]
    requests = _requests_by_task(settings, pictures, say)
    options = {"--models-dir": str(settings.models_dir), "--log-level": "warning"}
    first = next(iter(requests.values()))[:1]
    started = time.perf_counter()
    with running_service(options) as child:
        ours = Measured(child.url)
        asyncio.run(run_once(child.url, first, clients=1))
        ours.first_answer_s = time.perf_counter() - started
        measured = [ours, *([Measured(against)] if against else [])]
        for one in measured:  # load every model before anything is timed
            for name, ready in requests.items():
                say(f"warming up {name} on {one.url}")
                asyncio.run(run_once(one.url, ready, clients=2))
        say("raw engine")
        raw = raw_rates(settings, seconds=seconds / 2)
        for count in clients:
            for name, ready in requests.items():
                for one in measured:
                    say(f"{name}, {count} clients, {one.url}")
                    load = asyncio.run(run_load(one.url, ready, clients=count, seconds=seconds))
                    one.loads.setdefault(name, []).append(load)
            for one in measured if any(name in requests for name in IMPORT) else ():
                say(f"whole import, {count} clients, {one.url}")
                one.imports.append(_measure_import(one.url, requests, count, seconds))
        ours.resident_bytes = child.resident_bytes()
    return Result(
        machine=_machine(),
        cores=core_count(),
        version=__version__,
        pictures=len(pictures),
        raw=raw,
        ours=ours,
        against=measured[1] if against else None,
    )


def _requests_by_task(
    settings: Settings, pictures: Sequence[bytes], say: Say
) -> dict[str, list[httpx.Request]]:
    """Ready requests of every task whose models are here.

    Raises:
        ModelUnavailable: no configured model is here.
    """
    store = ModelStore(settings)
    requests = {}
    for name, call in standard_calls(settings).items():
        if missing := call.missing(store):
            say(f"{name} is not measured: {missing[0].name} is not in {settings.models_dir}")
        else:
            requests[name] = _requests(call, pictures)
    if not requests:
        raise ModelUnavailable(f"nothing to measure: no configured model in {settings.models_dir}")
    return requests


def _requests(call: Call, pictures: Sequence[bytes]) -> list[httpx.Request]:
    if call.takes_image:
        return [encode(call, image=picture) for picture in pictures]
    return [encode(call, text=query) for query in QUERIES]


def _measure_import(
    url: str, requests: dict[str, list[httpx.Request]], clients: int, seconds: float
) -> Load:
    """Each photo through every task, as an import does; the rate is in photos per second."""
    tasks = [name for name in IMPORT if name in requests]
    photos = [list(group) for group in zip(*(requests[name] for name in tasks), strict=True)]
    once = [request for photo in photos for request in photo]
    trial = asyncio.run(run_once(url, once, clients=clients))
    rounds = max(1, round(seconds * trial.per_s / len(once)))
    load = asyncio.run(run_once(url, once * rounds, clients=clients))
    return Load(
        clients, load.answers // len(tasks), load.per_s / len(tasks), load.p50_ms, load.p95_ms
    )


def _machine() -> str:
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = (line.partition(":") for line in cpuinfo.read_text().splitlines())
        name = next((v.strip() for k, _, v in lines if k.strip() == "model name"), name)
    return f"{name}, {platform.system()} {platform.machine()}, Python {platform.python_version()}"
