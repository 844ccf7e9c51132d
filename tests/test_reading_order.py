"""ARCHITECTURE's list of files to open is the list of files that a request enters."""

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from doubles.live import ALL, TEXTUAL, predict
from doubles.tiny_models import draw_faces

from immich_ml_metal.client.own_service import running_service

PAGE = Path(__file__).parents[1] / "ARCHITECTURE.md"
TRACING = Path(__file__).parent / "doubles" / "tracing"
PHOTO = draw_faces((160, 160))
PATIENCE_S = 30.0
# The gateway looks at the worker once a second: of quick requests, most see none of it.
QUICK_S = 0.7
ROUNDS = 5


class Traced:
    """The processes of a running service that note what they enter."""

    def __init__(self, url: str, gateway_pid: int, folder: Path) -> None:
        self.url = url
        (worker,) = psutil.Process(gateway_pid).children()
        self._pids = {"gateway": gateway_pid, "worker": worker.pid}
        self._folder = folder
        self._count = 0

    def entered(self) -> dict[str, set[str]]:
        """What each process entered since the last question."""
        self._count += 1
        for pid in self._pids.values():
            os.kill(pid, signal.SIGUSR1)
        return {name: set(self._read(pid)["entered"]) for name, pid in self._pids.items()}

    def _read(self, pid: int) -> Any:
        path = self._folder / f"{pid}.{self._count}.json"
        deadline = time.monotonic() + PATIENCE_S
        while not path.exists():
            assert time.monotonic() < deadline, f"process {pid} notes nothing"
            time.sleep(0.005)
        return json.loads(path.read_text())


@pytest.fixture(scope="module")
def traced(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Traced]:
    folder = tmp_path_factory.mktemp("trace")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACE_FOLDER", str(folder))
        patch.setenv("PYTHONPATH", str(TRACING))
        patch.setenv("ML_OFFLINE", "1")
        for part in ("CLIP", "FACE_DETECTION", "FACE_RECOGNITION", "OCR"):
            patch.setenv(f"ML_{part}_ENGINE", "cpu")  # the page follows this one on a Mac as well
        patch.setenv("ML_LOG_LEVEL", "warning")
        options = {"--models-dir": str(models)}
        with running_service(options) as child:
            send(child.url)  # everything is loaded now
            yield Traced(child.url, child.pid, folder)


def send(url: str) -> None:
    """A picture through every task, and a search text."""
    answers = predict(url, ALL, image=PHOTO), predict(url, TEXTUAL, text="red sea")
    assert [answer.status_code for answer in answers] == [200, 200]
    assert answers[0].json()["facial-recognition"], "the faces' second half was not needed"


def files_of_a_request(traced: Traced) -> dict[str, set[str]]:
    """The files that every one of several warm requests enters, by process."""
    rounds: list[dict[str, set[str]]] = []
    deadline = time.monotonic() + PATIENCE_S
    while len(rounds) < ROUNDS:
        assert time.monotonic() < deadline, "no request was quick enough to be told from the rest"
        traced.entered()
        started_s = time.monotonic()
        send(traced.url)
        is_quick = time.monotonic() - started_s < QUICK_S
        entered = traced.entered()
        if is_quick:
            rounds.append(entered)
    return {name: set.intersection(*(each[name] for each in rounds)) for name in rounds[0]}


def named(process: str) -> set[str]:
    """The files of the page's table under the heading of a process."""
    text = PAGE.read_text(encoding="utf-8")
    match = re.search(rf"^### In the {process}\n(.*?)(?=^#)", text, re.MULTILINE | re.DOTALL)
    assert match, f"the page has no heading for the {process}"
    first_cells = [line.split("|")[1] for line in match[1].splitlines() if line.startswith("| `")]
    return {name for cell in first_cells for name in re.findall(r"`([\w/]+\.py)`", cell)}


def test_the_page_names_the_files_that_a_warm_request_enters(traced: Traced) -> None:
    entered = files_of_a_request(traced)
    for process, files in entered.items():
        missing, idle = files - named(process), named(process) - files
        assert not missing, f"{PAGE.name} leaves out of the {process}: {sorted(missing)}"
        assert not idle, f"no request enters, but {PAGE.name} names: {sorted(idle)}"


def test_the_measurement_sees_what_a_request_does_not_do(traced: Traced) -> None:
    traced.entered()
    assert httpx.get(f"{traced.url}/health").is_success
    assert "gateway/health.py" in traced.entered()["gateway"]
    assert "gateway/health.py" not in files_of_a_request(traced)["gateway"]
