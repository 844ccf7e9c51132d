"""What `bench` measures, in order: start, raw engine, each task, a whole import, search, memory.

Speed is told as ratios made in the same minutes: two services are measured in turn, A B A B, in
rounds; what is told of each is the median of its rounds and their spread.
"""

import asyncio
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from immich_ml_metal import __version__
from immich_ml_metal.bench.load import (
    IN_FLIGHT,
    Form,
    Load,
    make_forms,
    run_import,
    run_load,
    run_once,
    run_search,
)
from immich_ml_metal.bench.machine import OtherWork, Processes
from immich_ml_metal.bench.raw import RawRate, raw_rates
from immich_ml_metal.client.calls import CLIP_TEXT, configured_names, find_photos, immich_calls
from immich_ml_metal.client.own_service import running_service
from immich_ml_metal.drawing import draw_preview
from immich_ml_metal.errors import InvalidImage, ModelUnavailable, RequestError
from immich_ml_metal.models.store import ModelStore
from immich_ml_metal.settings import Settings
from immich_ml_metal.tasks.images import ImageLimits, decode
from immich_ml_metal.threads import core_count

Say = Callable[[str], None]
Forms = Mapping[str, Sequence[Form]]  # ready requests by the name of their call
Measure = Callable[[str], Load]

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
DRAWN_PICTURES = 8
WHOLE_IMPORT, SEARCH, SEARCH_BESIDE = "whole import", "search", "search beside an import"
IDLE_S = 22.0  # two looks of the service at what it may give back


@dataclass(frozen=True, slots=True)
class Figure:
    """One number over all rounds."""

    median: float
    low: float
    high: float


@dataclass(slots=True)
class Row:
    """One kind of load on one service, over all rounds."""

    name: str
    clients: int
    loads: list[Load] = field(default_factory=list)

    def figure(self, value: str) -> Figure:
        """A field of `Load` over the rounds."""
        return summarise([getattr(load, value) for load in self.loads])


@dataclass(slots=True)
class Measured:
    """One service: what each kind of load saw, and memory in bytes where it is known."""

    url: str
    rows: list[Row] = field(default_factory=list)
    first_answer_s: float | None = None
    idle_private_bytes: int | None = None
    busy_private_bytes: int | None = None
    resident_bytes: int | None = None


@dataclass(slots=True)
class BenchReport:
    """Everything `bench` found, with the machine it was found on.

    Attributes:
        others_share: of all cores, used by neither service nor `bench` meanwhile, 0..1.
    """

    machine: str
    cores: int
    version: str
    pictures: int
    rounds: int
    raw: list[RawRate]
    ours: Measured
    against: Measured | None
    others_share: float


@dataclass(frozen=True, slots=True)
class Plan:
    """How long, with how many callers, and against whom; `say` is told what runs.

    Attributes:
        photos: pictures or folders of pictures; drawn ones when empty.
        clients: each number of callers is measured; none leaves the single tasks out.
        seconds: length of one measurement.
        rounds: of each measurement, the services in turn.
        against: address of a second service.
    """

    photos: Sequence[Path]
    clients: Sequence[int]
    seconds: float
    rounds: int
    against: str | None
    say: Say


def measure_all(settings: Settings, plan: Plan) -> BenchReport:
    """Run every measurement.

    Raises:
        ModelUnavailable: no configured model is here.
    """
    pictures = read_pictures(plan.photos, plan.say)
    forms = _forms_by_task(settings, pictures, plan.say)
    options = {"--models-dir": str(settings.models_dir), "--log-level": "warning"}
    started_s = time.perf_counter()
    with running_service(options) as own:
        asyncio.run(run_once(own.url, next(iter(forms.values()))[:1], clients=1))
        first_answer_s = time.perf_counter() - started_s
        bench = Bench({own.url: Processes(own.pid)}, forms, plan)
        raw = [] if not plan.clients else raw_rates(settings, seconds=plan.seconds / 2)
        bench.run()
    ours, *others = bench.measured
    ours.first_answer_s = first_answer_s
    return BenchReport(
        machine=_machine(),
        cores=core_count(),
        version=__version__,
        pictures=len(pictures),
        rounds=plan.rounds,
        raw=raw,
        ours=ours,
        against=others[0] if others else None,
        others_share=bench.others_share,
    )


class Bench:
    """The services in turn, one kind of load after the other."""

    def __init__(self, processes: dict[str, Processes], forms: Forms, plan: Plan) -> None:
        if plan.against:
            processes = {**processes, plan.against: Processes.behind(plan.against)}
        self.measured = [Measured(url) for url in processes]
        self.others_share = 0.0
        self._processes = processes
        self._forms = forms
        self._plan = plan

    def run(self) -> None:
        """Warm up, measure every kind of load, then the memory that stays."""
        for service in self.measured:
            for name, forms in self._forms.items():
                self._plan.say(f"warming up {name} on {service.url}")
                asyncio.run(run_once(service.url, forms, clients=2))
        others = OtherWork(self._processes.values())
        for clients in self._plan.clients:
            for name, forms in self._forms.items():
                self._in_turn(name, clients, self._task(forms, clients))
        self._measure_import()
        self._measure_search()
        self.others_share = others.share()
        self._plan.say("memory when idle")
        time.sleep(IDLE_S)
        for service in self.measured:
            service.idle_private_bytes = self._processes[service.url].private_bytes()
            service.resident_bytes = self._processes[service.url].resident_bytes()

    def _task(self, forms: Sequence[Form], clients: int) -> Measure:
        seconds = self._plan.seconds
        return lambda url: asyncio.run(run_load(url, forms, clients=clients, seconds=seconds))

    def _measure_import(self) -> None:
        if not any(name in self._forms for name in IN_FLIGHT):
            return
        trial = asyncio.run(run_import(self.measured[0].url, self._forms, photos=6))
        photos = max(6, round(self._plan.seconds * trial.per_s))  # the same work for both
        clients = sum(count for name, count in IN_FLIGHT.items() if name in self._forms)
        self._in_turn(
            WHOLE_IMPORT, clients, lambda url: asyncio.run(run_import(url, self._forms, photos))
        )

    def _measure_search(self) -> None:
        if (queries := self._forms.get(CLIP_TEXT)) is None:
            return

        def search(beside: Forms | None) -> Measure:
            seconds = self._plan.seconds
            return lambda url: asyncio.run(run_search(url, queries, seconds=seconds, beside=beside))

        self._in_turn(SEARCH, 1, search(None))
        if any(name in self._forms for name in IN_FLIGHT):
            self._in_turn(SEARCH_BESIDE, 1, search(self._forms))

    def _in_turn(self, name: str, clients: int, measure: Measure) -> None:
        self._plan.say(f"{name}, {clients} in flight")
        rows = [Row(name, clients) for _ in self.measured]
        for _ in range(self._plan.rounds):
            for service, row in zip(self.measured, rows, strict=True):
                load = self._watched(service, measure)
                # beside an import the processor works for the import, not for the searches
                row.loads.append(replace(load, cpu_ms=None) if name == SEARCH_BESIDE else load)
        for service, row in zip(self.measured, rows, strict=True):
            service.rows.append(row)

    def _watched(self, service: Measured, measure: Measure) -> Load:
        """One measurement, with the processor time it took and the memory right behind it."""
        processes = self._processes[service.url]
        before_s = processes.cpu_s()
        load = measure(service.url)
        after_s = processes.cpu_s()
        if (private := processes.private_bytes()) is not None:
            service.busy_private_bytes = max(private, service.busy_private_bytes or 0)
        if before_s is None or after_s is None:
            return load
        return replace(load, cpu_ms=1000 * (after_s - before_s) / load.answers)


def summarise(values: Sequence[float]) -> Figure:
    """The median, and how far the rounds lie apart."""
    return Figure(statistics.median(values), min(values), max(values))


def ratios(ours: Row, theirs: Row) -> Figure:
    """Our answers per second to theirs, round by round: a slow minute slows both."""
    pairs = zip(ours.loads, theirs.loads, strict=True)
    return summarise([mine.per_s / other.per_s for mine, other in pairs])


def read_pictures(photos: Sequence[Path], say: Say) -> list[bytes]:
    """The pictures that can be decoded, a bad one named; drawn ones when none are asked for.

    Raises:
        InvalidImage: none of those that were asked for can be.
    """
    if not photos:
        return [draw_preview(seed) for seed in range(DRAWN_PICTURES)]
    good = []
    for file in find_photos(photos):
        try:
            data = file.read_bytes()
            decode(data, ImageLimits())
            good.append(data)
        except (RequestError, OSError) as exc:
            say(f"{file} is not measured: {exc}")
    if not good:
        raise InvalidImage("none of these pictures can be measured")
    return good


def _forms_by_task(settings: Settings, pictures: Sequence[bytes], say: Say) -> Forms:
    """Ready requests of every task whose models are here.

    Raises:
        ModelUnavailable: no configured model is here.
    """
    store = ModelStore(settings)
    forms = {}
    for name, call in immich_calls(configured_names(settings)).items():
        if missing := call.missing(store):
            say(f"{name} is not measured: {missing[0].name} is not in {settings.models_dir}")
        else:
            forms[name] = make_forms(call, pictures if call.takes_image else QUERIES)
    if not forms:
        raise ModelUnavailable(f"nothing to measure: no configured model in {settings.models_dir}")
    return forms


def _machine() -> str:
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = (line.partition(":") for line in cpuinfo.read_text().splitlines())
        name = next((v.strip() for k, _, v in lines if k.strip() == "model name"), name)
    return f"{name}, {platform.system()} {platform.machine()}, Python {platform.python_version()}"
