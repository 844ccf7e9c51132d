"""What to change on the Immich side, given its settings and what this service is. Pure."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from immich_ml_metal.immich.api import ServerSettings
from immich_ml_metal.immich.whose import is_ours
from immich_ml_metal.types import Task

# Enough in flight that batches form, while each waits its turn well below Immich's 300 s.
GOOD_CONCURRENCY: Mapping[str, int] = MappingProxyType({Task.CLIP: 8, Task.FACES: 4, Task.OCR: 4})
WORTH_IT = 1.05  # below this a gain is noise
SLOW_SEARCH_S, NOTICEABLY = 0.5, 1.5  # a search that takes longer, by so much, is felt
_TITLES: Mapping[str, str] = MappingProxyType(
    {Task.CLIP: "smart search", Task.FACES: "face detection", Task.OCR: "OCR"}
)
SQUASH_SINCE = (3, 3)  # the first server whose own service squashes where models say so


@dataclass(frozen=True, slots=True)
class OurSide:
    """This service, as Immich could see it.

    Attributes:
        port: where it listens.
        hosts: names and addresses of this machine.
        immich_compat: the resize rule in force.
        why_not_served: task and model name → why it cannot be served here; empty when it can.
        engines: the engine of each task, where known.
        gains: measured images per second at more in flight over that at Immich's setting.
        search_s: measured seconds of a search while all queues run, as Immich is set and as we
            would advise for throughput.
        squashes: whether the resize rule makes a difference for a search model.
        immich_url: where Immich is reached, which tells whether it runs on this machine.
    """

    port: int
    hosts: frozenset[str]
    immich_compat: str
    why_not_served: Callable[[Task, str], str]
    engines: Mapping[str, str] = field(default_factory=dict)
    gains: Mapping[str, float] | None = None
    search_s: tuple[float, float] | None = None
    squashes: Callable[[str], bool] = lambda _: True
    immich_url: str = "http://localhost"


@dataclass(frozen=True, slots=True)
class Advice:
    """One thing to do; `is_fault` where photos go without results until it is done."""

    text: str
    is_fault: bool = False


def advise(server: ServerSettings, ours: OurSide) -> list[Advice]:
    """Everything worth changing, faults first."""
    found = [
        *_reach(server, ours),
        *_models(server, ours),
        *_rule(server, ours),
        *_speed(server, ours),
    ]
    return sorted(found, key=lambda advice: not advice.is_fault)


def _reach(server: ServerSettings, ours: OurSide) -> Iterator[Advice]:
    if not server.is_enabled:
        yield Advice("machine learning is switched off in Immich's settings", is_fault=True)
    mine = [url for url in server.urls if is_ours(url, ours.immich_url, ours.port, ours.hosts)]
    if not mine:
        yield Advice(
            f"none of Immich's URLs ({', '.join(server.urls) or 'none'}) looks like this machine "
            f"on port {ours.port}: add it under Machine Learning > URL",
            is_fault=True,
        )
    elif server.urls[0] not in mine:
        yield Advice(
            f"{server.urls[0]} is asked first; move {mine[0]} to the top to use this machine"
        )
    if len(server.urls) > 1 and not server.availability_checks:
        yield Advice(
            "several URLs without availability checks: a dead one is asked first each time"
        )


def _models(server: ServerSettings, ours: OurSide) -> Iterator[Advice]:
    for task, name in server.models.items():
        if reason := ours.why_not_served(Task(task), name):
            yield Advice(f"{_TITLES[task]} asks for {name}: {reason}", is_fault=True)
        elif ours.engines.get(task) == "vision":
            yield Advice(
                f"{_TITLES[task]} asks for {name}, which the engine vision does not run: Apple "
                "Vision answers instead; profile = exact runs the official model"
            )


def _rule(server: ServerSettings, ours: OurSide) -> Iterator[Advice]:
    version, model = _numbers(server.version), server.models.get(Task.CLIP, "")
    if len(version) < len(SQUASH_SINCE) or not model or not ours.squashes(model):
        return
    squashes = version >= SQUASH_SINCE
    if squashes != (ours.immich_compat == "3.3"):
        other = "3.3" if squashes else "3.2"
        yield Advice(
            f"Immich is {server.version} but immich_compat is {ours.immich_compat}: {model} sees "
            f"pictures otherwise; use {other} if Immich's own service built the index"
        )


def _numbers(version: str) -> tuple[int, ...]:
    parts = version.split(".")[:2]
    return tuple(int(part) for part in parts) if all(part.isdigit() for part in parts) else ()


def _speed(server: ServerSettings, ours: OurSide) -> Iterator[Advice]:
    gains = ours.gains or {}
    for task, now in server.concurrency.items():
        good, gain = GOOD_CONCURRENCY[task], gains.get(task)
        if task not in server.models or now >= good or (gain is not None and gain <= WORTH_IT):
            continue
        title = _TITLES[task]
        if gain is None:
            yield Advice(
                f"{title} runs {now} at once: more may be faster, and makes searches wait longer; "
                "immich status --measure tells both"
            )
        elif ours.search_s is not None and _is_slow(*ours.search_s):
            yield Advice(
                f"{title} runs {now} at once: {good} would give {gain:.1f} times the throughput, "
                f"but {_searches(*ours.search_s)}; leave it, unless nobody searches meanwhile"
            )
        else:
            searches = f"; {_searches(*ours.search_s)}" if ours.search_s is not None else ""
            yield Advice(
                f"{title} runs {now} at once: raise it to {good}, measured here: {gain:.1f} times "
                f"the throughput{searches}"
            )


def _is_slow(now_s: float, then_s: float) -> bool:
    """Whether people would notice that searches got slower."""
    return then_s > SLOW_SEARCH_S and then_s > NOTICEABLY * now_s


def _searches(now_s: float, then_s: float) -> str:
    return f"a search during an import takes {then_s:.2f} s instead of {now_s:.2f} s"
