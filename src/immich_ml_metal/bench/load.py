"""The closed-loop client: callers that send their next request when the last is answered."""

import asyncio
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import httpx

from immich_ml_metal.client.calls import checked

_ANSWER_TIMEOUT_S = 300.0  # Node's own limit


@dataclass(frozen=True, slots=True)
class Load:
    """What one measurement saw: answers per second, and latency percentiles in milliseconds."""

    clients: int
    answers: int
    per_s: float
    p50_ms: float
    p95_ms: float


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
    async with httpx.AsyncClient(limits=limits, timeout=_ANSWER_TIMEOUT_S) as client:
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
