"""Ten minutes of everything at once: an import, searches, kills, idle stops, hostile requests.

`SOAK_MINUTES` chooses another length. Run with `-s` to read the figures.
"""

import itertools
import json
import os
import random
import signal
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from doubles.live import TEXTUAL, VISUAL, face_entries, text_entries
from doubles.tiny_models import draw_faces
from doubles.whole_service import health, whole_service
from fuzz.storm import as_request, ask, form, mutated_forms, mutated_heads, mutated_pictures

from immich_ml_metal.system.footprint import private_bytes

MINUTES = float(os.environ.get("SOAK_MINUTES", "10"))
HOSTILE = 0.05  # of all requests
PHASE_S = 45.0  # of load; after it nobody asks until the worker has ended
IDLE_S = 4  # after which the worker ends
KILL_S = 15.0
MB = 2**20

pytestmark = [pytest.mark.soak, pytest.mark.timeout(MINUTES * 60 + 300)]


def good_requests() -> list[bytes]:
    """Every task, over several pictures and texts."""
    pictures = [draw_faces((60 + 9 * n, 60), size=(320 + 8 * n, 240)) for n in range(6)]
    asked = [VISUAL, face_entries(), text_entries()]
    requests = [form(entries, image=image) for entries in asked for image in pictures]
    requests += [form(TEXTUAL, text=b"a dog and %d cats" % n) for n in range(6)]
    return [as_request(request) for request in requests]


def hostile_requests(seed: int) -> Iterator[bytes]:
    kinds = mutated_forms(seed), mutated_pictures(seed), mutated_heads(seed)
    return itertools.chain.from_iterable(zip(*kinds, strict=True))


def meaning(status: int, body: bytes) -> Any:
    """What must be the same each time."""
    return status, json.loads(body) if status == 200 else body


class Callers:
    """Clients that check each good answer against the first one, while `is_on` is set."""

    def __init__(self, port: int, right: dict[bytes, Any], clients: int = 5) -> None:
        self.good = 0
        self.failed: list[Any] = []
        self.hostile: Counter[int] = Counter()
        self.is_on, self._over = threading.Event(), threading.Event()
        self._port, self._right, self._lock = port, right, threading.Lock()
        self._busy = 0
        self._threads = [threading.Thread(target=self._run, args=(n,)) for n in range(clients)]
        for thread in self._threads:
            thread.start()

    def _run(self, seed: int) -> None:
        rng, hostile, good = random.Random(seed), hostile_requests(seed), list(self._right)
        while not self._over.is_set():
            if not self.is_on.wait(0.2):
                continue
            with self._lock:
                self._busy += 1
            try:
                if rng.random() < HOSTILE:
                    self._attack(next(hostile))
                else:
                    self._ask(rng.choice(good))
            finally:
                with self._lock:
                    self._busy -= 1

    def _ask(self, request: bytes) -> None:
        status, body, _ = ask(self._port, request)
        is_right = meaning(status, body) == self._right[request]
        with self._lock:
            self.good += is_right
            if not is_right:
                self.failed.append((status, body[:300]))

    def _attack(self, request: bytes) -> None:
        status, _, _ = ask(self._port, request, 0.5)
        with self._lock:
            self.hostile[status] += 1

    def rest(self) -> None:
        """Stop asking, and wait for the last answers."""
        self.is_on.clear()
        eventually(lambda: self._busy == 0, "the last answers")

    def end(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()


def eventually(condition: Callable[[], Any], what: str, patience_s: float = 60.0) -> None:
    end_s = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < end_s, what
        time.sleep(0.1)


def worker_pid(port: int) -> int | None:
    pid: int | None = health(port)["worker"].get("pid")
    return pid


def load(port: int, length_s: float, *, kills: bool) -> int:
    """Leave the callers alone for a time; gives how often the worker was killed under them."""
    killed, end_s = 0, time.monotonic() + length_s
    while (left_s := end_s - time.monotonic()) > 0:
        time.sleep(min(left_s, KILL_S))
        if kills and left_s > KILL_S and (pid := worker_pid(port)) is not None:
            os.kill(pid, signal.SIGKILL)
            killed += 1
    return killed


def size(pid: int) -> tuple[float, int]:
    """Memory of its own in MB, and open descriptors."""
    return (private_bytes(pid) or 0) / MB, psutil.Process(pid).num_fds()


def told(name: str, sizes: list[tuple[float, int]]) -> tuple[float, float]:
    """Print a process's sizes over time; gives how much its memory and descriptors grew.

    The first quarter is left out: a heap takes some minutes to reach its size.
    """
    sys.stdout.write(f"\n    {name}: " + ", ".join(f"{mb:.0f} MB {n}" for mb, n in sizes))
    sizes = sizes[len(sizes) // 4 :]
    third = max(1, len(sizes) // 3)
    ends = [sizes[:third], sizes[-third:]]
    memory, descriptors = (
        [statistics.median(one[column] for one in end) for end in ends] for column in (0, 1)
    )
    return memory[1] - memory[0], descriptors[1] - descriptors[0]


def test_ten_minutes_of_everything_fail_nobody_and_grow_nothing(
    models: Path, tmp_path: Path
) -> None:
    with whole_service(models, tmp_path, ML_MODEL_TTL=str(IDLE_S), ML_MODEL_TTL_POLL_S="1") as port:
        right = {one: meaning(*ask(port, one)[:2]) for one in good_requests()}
        assert {status for status, _ in right.values()} == {200}
        gateway_pid = int(health(port)["gateway"]["pid"])
        callers = Callers(port, right)
        gateway, worker, killed, idle_stops = [], [], 0, 0
        end_s = time.monotonic() + MINUTES * 60
        try:
            while time.monotonic() < end_s - MINUTES * 30:  # half of the time
                callers.is_on.set()
                killed += load(port, PHASE_S, kills=True)
                callers.rest()
                eventually(lambda: worker_pid(port) is None, "an idle stop")
                idle_stops += 1
                gateway.append(size(gateway_pid))
            callers.is_on.set()
            eventually(lambda: health(port)["worker"]["state"] == "ready", "a worker")
            steady = worker_pid(port)
            assert steady is not None
            while time.monotonic() < end_s:  # one worker for the other half
                load(port, PHASE_S / 3, kills=False)
                worker.append(size(steady))
            assert worker_pid(port) == steady
            callers.rest()
            eventually(lambda: worker_pid(port) is None, "an idle stop")
            gateway.append(size(gateway_pid))
        finally:
            callers.end()
    gateway_growth, worker_growth = told("gateway", gateway), told("worker", worker)
    sys.stdout.write(
        f"\n    {callers.good} good answers, {len(callers.failed)} failed, {killed} kills, "
        f"{idle_stops} idle stops, hostile {dict(callers.hostile)}; grew by (MB, descriptors) "
        f"gateway {gateway_growth}, worker {worker_growth}\n"
    )
    assert callers.failed == []
    assert not {status for status in callers.hostile if status >= 500}
    assert gateway_growth[0] < 5
    assert worker_growth[0] < 20
    assert max(gateway_growth[1], worker_growth[1]) <= 5  # a connection or two still open
