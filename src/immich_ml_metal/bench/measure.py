"""What `bench` measures, in order: start, raw engine, each task, a whole import, memory.

Callers are closed loops: each sends its next request when the last is answered. Two services are
measured in turn, A B A B, so that a machine busy for a moment does not decide between them.
"""

import asyncio
import itertools
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from immich_ml_metal import __version__
from immich_ml_metal.bench.raw import RawRate, raw_rates
from immich_ml_metal.client.calls import (
    ANSWER_TIMEOUT_S,
    CLIP_IMAGE,
    FACES,
    TEXT,
    Call,
    checked,
    configured_names,
    encode,
    find_photos,
    immich_calls,
)
from immich_ml_metal.client.own_service import OwnService, running_service
from immich_ml_metal.drawing import draw_preview
from immich_ml_metal.errors import ModelUnavailable
from immich_ml_metal.models.store import ModelStore
from immich_ml_metal.settings import Settings
from immich_ml_metal.threads import core_count

Say = Callable[[str], None]
Requests = dict[str, list[httpx.Request]]  # ready requests by the name of their call

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
IMPORT = (CLIP_IMAGE, FACES, TEXT)  # what Immich asks of every new photo
DRAWN_PICTURES = 8
TURNS = 2  # of each service, where there are two; the better one counts


@dataclass(frozen=True, slots=True)
class Load:
    """What one measurement saw: answers per second, and latency percentiles in milliseconds."""

    clients: int
    answers: int
    per_s: float
    p50_ms: float
    p95_ms: float


@dataclass(slots=True)
class Measured:
    """One service: loads by task, whole imports in photos per second, memory."""

    url: str
    loads: dict[str, list[Load]] = field(default_factory=dict)
    imports: list[Load] = field(default_factory=list)
    first_answer_s: float | None = None
    resident_bytes: int | None = None


@dataclass(slots=True)
class BenchReport:
    """Everything `bench` found, with the machine it was found on."""

    machine: str
    cores: int
    version: str
    pictures: int
    raw: list[RawRate]
    ours: Measured
    against: Measured | None


@dataclass(frozen=True, slots=True)
class Plan:
    """How long, with how many callers, and against whom; `say` is told what runs.

    Attributes:
        photos: pictures or folders of pictures; drawn ones when empty.
        clients: each number of callers is measured.
        seconds: length of one measurement.
        against: address of a second service.
    """

    photos: Sequence[Path]
    clients: Sequence[int]
    seconds: float
    against: str | None
    say: Say


def measure_all(settings: Settings, plan: Plan) -> BenchReport:
    """Run every measurement.

    Raises:
        ModelUnavailable: no configured model is here.
    """
    pictures = [file.read_bytes() for file in find_photos(plan.photos)]
    pictures = pictures or [draw_preview(seed) for seed in range(DRAWN_PICTURES)]
    requests = _requests_by_task(settings, pictures, plan.say)
    options = {"--models-dir": str(settings.models_dir), "--log-level": "warning"}
    started_s = time.perf_counter()
    with running_service(options) as own:
        ours = _first_answer(own, requests, started_s)
        services = [ours, *([Measured(plan.against)] if plan.against else [])]
        _warm_up(services, requests, plan.say)
        plan.say("raw engine")
        raw = raw_rates(settings, seconds=plan.seconds / 2)
        for count in plan.clients:
            _measure_tasks(services, requests, count, plan)
            _measure_imports(services, requests, count, plan)
        ours.resident_bytes = own.resident_bytes()
    against = services[1] if plan.against else None
    return BenchReport(_machine(), core_count(), __version__, len(pictures), raw, ours, against)


def _first_answer(own: OwnService, requests: Requests, started_s: float) -> Measured:
    first = next(iter(requests.values()))[:1]
    asyncio.run(run_once(own.url, first, clients=1))
    return Measured(own.url, first_answer_s=time.perf_counter() - started_s)


def _warm_up(services: Sequence[Measured], requests: Requests, say: Say) -> None:
    """Load every model before anything is timed."""
    for service in services:
        for name, ready in requests.items():
            say(f"warming up {name} on {service.url}")
            asyncio.run(run_once(service.url, ready, clients=2))


def _measure_tasks(
    services: Sequence[Measured], requests: Requests, clients: int, plan: Plan
) -> None:
    for name, ready in requests.items():

        def measure(url: str, ready: list[httpx.Request] = ready) -> Load:
            return asyncio.run(run_load(url, ready, clients=clients, seconds=plan.seconds))

        plan.say(f"{name}, {clients} clients")
        for service, load in zip(services, in_turn(services, measure), strict=True):
            service.loads.setdefault(name, []).append(load)


def _measure_imports(
    services: Sequence[Measured], requests: Requests, clients: int, plan: Plan
) -> None:
    if not any(name in requests for name in IMPORT):
        return
    plan.say(f"whole import, {clients} clients")
    loads = in_turn(services, lambda url: _measure_import(url, requests, clients, plan.seconds))
    for service, load in zip(services, loads, strict=True):
        service.imports.append(load)


def in_turn(services: Sequence[Measured], measure: Callable[[str], Load]) -> list[Load]:
    """Measure each service in turn, more than once where there are two; the best of each."""
    turns = TURNS if len(services) > 1 else 1
    rounds = [[measure(service.url) for service in services] for _ in range(turns)]
    return [max(loads, key=lambda load: load.per_s) for loads in zip(*rounds, strict=True)]


async def run_load(
    url: str, requests: Sequence[httpx.Request], *, clients: int, seconds: float
) -> Load:
    """Send `requests` round and round from `clients` callers for `seconds`."""
    deadline = time.perf_counter() + seconds
    endless = itertools.takewhile(
        lambda _: time.perf_counter() < deadline, itertools.cycle(requests)
    )
    at_least_one = itertools.chain(requests[:1], endless)
    return await _drive(url, at_least_one, clients)


async def run_once(url: str, requests: Sequence[httpx.Request], *, clients: int) -> Load:
    """Send each of `requests` once, in order, from `clients` callers."""
    return await _drive(url, iter(requests), clients)


async def _drive(url: str, requests: Iterator[httpx.Request], clients: int) -> Load:
    latencies_s: list[float] = []
    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(
        limits=limits, timeout=ANSWER_TIMEOUT_S, trust_env=False
    ) as client:
        started = time.perf_counter()
        await asyncio.gather(
            *(_one_client(client, url, requests, latencies_s) for _ in range(clients))
        )
        elapsed_s = time.perf_counter() - started
    ordered = sorted(latencies_s)
    return Load(
        clients=clients,
        answers=len(ordered),
        per_s=len(ordered) / elapsed_s,
        p50_ms=1000 * ordered[len(ordered) // 2],
        p95_ms=1000 * ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))],
    )


async def _one_client(
    client: httpx.AsyncClient,
    url: str,
    requests: Iterator[httpx.Request],
    latencies_s: list[float],
) -> None:
    for request in requests:
        started = time.perf_counter()
        with checked(url):
            answer = await client.post(
                f"{url}/predict",
                content=request.content,
                headers={"content-type": request.headers["content-type"]},
            )
            answer.raise_for_status()
        latencies_s.append(time.perf_counter() - started)


def _requests_by_task(settings: Settings, pictures: Sequence[bytes], say: Say) -> Requests:
    """Ready requests of every task whose models are here.

    Raises:
        ModelUnavailable: no configured model is here.
    """
    store = ModelStore(settings)
    requests = {}
    for name, call in immich_calls(configured_names(settings)).items():
        if missing := call.missing(store):
            say(f"{name} is not measured: {missing[0].name} is not in {settings.models_dir}")
        else:
            requests[name] = _requests(call, pictures)
    if not requests:
        raise ModelUnavailable(f"nothing to measure: no configured model in {settings.models_dir}")
    return requests


def _requests(call: Call, pictures: Sequence[bytes]) -> list[httpx.Request]:
    return [encode(call, payload) for payload in (pictures if call.takes_image else QUERIES)]


def _measure_import(url: str, requests: Requests, clients: int, seconds: float) -> Load:
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
