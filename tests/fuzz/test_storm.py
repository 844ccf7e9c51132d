"""A whole service, gateway and worker, under mutated requests."""

import json
import os
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from doubles.gateway import free_port
from doubles.live import TEXTUAL
from fuzz.storm import as_request, ask, form, mutated_forms, storm

GOOD = as_request(form(TEXTUAL, text=b"a dog"))


@contextmanager
def whole_service(models: Path, folder: Path, **more: str) -> Iterator[int]:
    port = free_port()
    environment = {
        **os.environ,
        "ML_MODELS_DIR": str(models),
        "ML_STATE_DIR": str(folder),
        "ML_OFFLINE": "true",
        "ML_HOST": "127.0.0.1",
        "ML_PORT": str(port),
        "ML_MODEL_TTL": "0",
        **more,
    }
    log = (folder / "log").open("wb")
    command = [sys.executable, "-m", "immich_ml_metal", "serve"]
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        until_s = time.monotonic() + 30
        while True:
            try:
                assert ask(port, GOOD)[0] == 200
                break
            except OSError:
                assert time.monotonic() < until_s, (folder / "log").read_text()
                time.sleep(0.05)
        yield port
        assert process.poll() is None
    finally:
        process.terminate()
        process.wait(30)
        log.close()


def health(port: int) -> Any:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10) as answer:
        return json.load(answer)


class Beside:
    """Good searches and `/ping` all the while; times in seconds."""

    def __init__(self, port: int) -> None:
        self.searches: list[tuple[int, float]] = []
        self.pings: list[float] = []
        self._port = port
        self._over = threading.Event()
        self._threads = [threading.Thread(target=one) for one in (self._search, self._ping)]
        for thread in self._threads:
            thread.start()

    def _search(self) -> None:
        while not self._over.wait(0.2):
            status, _, took_s = ask(self._port, GOOD)
            self.searches.append((status, took_s))

    def _ping(self) -> None:
        while not self._over.wait(0.02):
            self.pings.append(ask(self._port, b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n")[2])

    def end(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()


def worker_ends(health: Any) -> int:
    causes = health["failures"]["by_cause"]
    return sum(count for cause, count in causes.items() if cause.startswith("worker ended"))


def weather(port: int, kind: str, count: int, *, ping_s: float, search_s: float) -> None:
    """Let a storm pass, and look at what it left."""
    before = health(port)
    beside = Beside(port)
    report = storm(port, kind, count)
    beside.end()
    after = health(port)
    pings = sorted(beside.pings)
    ping_p99_s = pings[int(len(pings) * 0.99)]
    slowest_search_s = max([took_s for _, took_s in beside.searches], default=0)
    grown = after["gateway"]["memory_bytes"] - before["gateway"]["memory_bytes"]
    sys.stdout.write(
        f"\n    {count} {kind}: {dict(report.statuses)}, slowest {report.slowest_s:.2f} s; beside "
        f"them: /ping p99 {ping_p99_s * 1e3:.0f} ms, slowest search {slowest_search_s:.2f} s; "
        f"gateway {grown / 2**20:+.1f} MB\n"
    )
    assert report.bad == []
    assert sum(report.statuses.values()) == count
    assert {status for status, _ in beside.searches} <= {200}
    assert slowest_search_s < search_s
    assert ping_p99_s < ping_s
    assert after["worker"]["pid"] == before["worker"]["pid"]
    assert worker_ends(after) == worker_ends(before) == 0
    assert grown < 20 * 2**20


@pytest.fixture(scope="module")
def port(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with whole_service(models, tmp_path_factory.mktemp("service")) as port:
        yield port


@pytest.mark.parametrize(("kind", "count"), [("forms", 600), ("pictures", 300), ("heads", 400)])
def test_no_mutated_request_is_a_failure_a_delay_or_a_restart(
    port: int, kind: str, count: int
) -> None:
    weather(port, kind, count, ping_s=0.5, search_s=3)  # a developer's machine is busy


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("kind", "count"), [("forms", 100_000), ("pictures", 20_000), ("heads", 50_000)]
)
def test_nor_are_a_hundred_thousand(port: int, kind: str, count: int) -> None:
    weather(port, kind, count, ping_s=0.1, search_s=1.5)


def test_the_same_seed_makes_the_same_requests() -> None:
    first, again, other = (mutated_forms(seed) for seed in (1, 1, 2))
    one, two, three = ([next(made) for _ in range(50)] for made in (first, again, other))
    assert one == two != three
