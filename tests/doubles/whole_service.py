"""A whole service, gateway and worker, in processes of their own, and callers beside others."""

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

from doubles.gateway import free_port
from doubles.live import TEXTUAL
from fuzz.storm import as_request, ask, form

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
        until_s = time.monotonic() + 60
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
