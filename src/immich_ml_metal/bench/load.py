"""Callers that keep requests in flight, as Immich does, and what they see.

Closed loops: each sends its next request when the last is answered. Every picture is another one,
by bytes behind its end that no decoder reads: a service that knows one again gains nothing.
"""

import asyncio
import itertools
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import httpx

from immich_ml_metal.client.calls import (
    ANSWER_TIMEOUT_S,
    CLIP_IMAGE,
    FACES,
    TEXT,
    Call,
    checked,
    encode,
)

IN_FLIGHT: Mapping[str, int] = {CLIP_IMAGE: 2, FACES: 2, TEXT: 1}  # Immich's own defaults
SEARCH_PAUSE_S = 0.1  # a person is slower; this gives a percentile in seconds
_MARK = bytes(16)  # behind a picture, where its number goes
_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Load:
    """What one measurement saw.

    Attributes:
        answers: requests, or photos of an import.
        per_s: of them.
        p50_ms, p95_ms: latency of a request.
        cpu_ms: processor time of the service for each of `answers`; None for one elsewhere.
    """

    answers: int
    per_s: float
    p50_ms: float
    p95_ms: float
    cpu_ms: float | None = None


@dataclass(frozen=True, slots=True)
class Form:
    """A request's body, in two halves around the number that makes its picture another one."""

    content_type: str
    head: bytes
    tail: bytes
    is_picture: bool

    def body(self) -> bytes:
        """Another body each time; a text stays as it is."""
        if not self.is_picture:
            return self.head
        return b"%s%0*x%s" % (self.head, len(_MARK), next(_numbers), self.tail)


def make_forms(call: Call, payloads: Iterable[bytes | str]) -> list[Form]:
    """The call about each of `payloads`, ready to be sent as often as wanted."""
    return [_make_form(call, payload) for payload in payloads]


def _make_form(call: Call, payload: bytes | str) -> Form:
    is_picture = isinstance(payload, bytes)
    request = encode(call, payload + _MARK if isinstance(payload, bytes) else payload)
    head, _, tail = request.content.rpartition(_MARK if is_picture else b"\0")
    if not is_picture:
        head, tail = tail, b""
    return Form(request.headers["content-type"], head, tail, is_picture)


async def run_load(url: str, forms: Sequence[Form], *, clients: int, seconds: float) -> Load:
    """Send `forms` round and round from `clients` callers for `seconds`."""
    return await _drive(url, [(_for(forms, seconds), clients)])


async def run_once(url: str, forms: Sequence[Form], *, clients: int) -> Load:
    """Send each of `forms` once, in order, from `clients` callers."""
    return await _drive(url, [(iter(forms), clients)])


async def run_import(url: str, forms: Mapping[str, Sequence[Form]], photos: int) -> Load:
    """Take `photos` through every task, with as many of each in flight as Immich keeps."""
    streams = [
        (itertools.islice(itertools.cycle(forms[name]), photos), count)
        for name, count in IN_FLIGHT.items()
        if name in forms
    ]
    load = await _drive(url, streams)
    tasks = len(streams)
    return Load(load.answers // tasks, load.per_s / tasks, load.p50_ms, load.p95_ms)


async def run_search(
    url: str,
    queries: Sequence[Form],
    *,
    seconds: float,
    beside: Mapping[str, Sequence[Form]] | None = None,
) -> Load:
    """Search again and again for `seconds`, beside an import of `beside` if that is given."""
    others = [
        (_for(beside[name], seconds), count)
        for name, count in IN_FLIGHT.items()
        if beside and name in beside
    ]
    searching = _drive(url, [(_for(queries, seconds), 1)], pause_s=SEARCH_PAUSE_S)
    loads = await asyncio.gather(searching, *([_drive(url, others)] if others else []))
    return loads[0]


def _for(forms: Sequence[Form], seconds: float) -> Iterator[Form]:
    """Round and round until `seconds` from now; one at the least."""
    deadline = time.perf_counter() + seconds
    endless = itertools.takewhile(lambda _: time.perf_counter() < deadline, itertools.cycle(forms))
    return itertools.chain(forms[:1], endless)


async def _drive(
    url: str, streams: Sequence[tuple[Iterator[Form], int]], *, pause_s: float = 0.0
) -> Load:
    latencies_s: list[float] = []
    limits = httpx.Limits(max_connections=sum(clients for _, clients in streams))
    async with httpx.AsyncClient(
        limits=limits, timeout=ANSWER_TIMEOUT_S, trust_env=False
    ) as client:
        started_s = time.perf_counter()
        await asyncio.gather(
            *(
                _one_client(client, url, forms, latencies_s, pause_s)
                for forms, clients in streams
                for _ in range(clients)
            )
        )
        elapsed_s = time.perf_counter() - started_s
    ordered = sorted(latencies_s)
    return Load(
        answers=len(ordered),
        per_s=len(ordered) / elapsed_s,
        p50_ms=1000 * ordered[len(ordered) // 2],
        p95_ms=1000 * ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))],
    )


async def _one_client(
    client: httpx.AsyncClient,
    url: str,
    forms: Iterator[Form],
    latencies_s: list[float],
    pause_s: float,
) -> None:
    for form in forms:
        body = form.body()
        started_s = time.perf_counter()
        with checked(url):
            headers = {"content-type": form.content_type}
            answer = await client.post(f"{url}/predict", content=body, headers=headers)
            answer.raise_for_status()
        latencies_s.append(time.perf_counter() - started_s)
        if pause_s:
            await asyncio.sleep(pause_s)
