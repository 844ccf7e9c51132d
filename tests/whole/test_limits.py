"""The real service at its limits, memory and open files: jobs wait, none is lost."""

import concurrent.futures
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from doubles.files import let_open, limit_of
from doubles.live import TEXTUAL, VISUAL, face_entries, predict
from doubles.tiny_models import draw_faces

from immich_ml_metal.client.own_service import OwnService, running_service

PATIENCE_S = 60.0
PHOTO = draw_faces((160, 160))
LARGE = draw_faces((160, 160), size=(8000, 8000))  # 190 MB decoded
# Enough for a small request, and not for the large picture.
SPARE_BYTES = 120 * 2**20


@pytest.fixture
def service(models: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[OwnService]:
    monkeypatch.setenv("ML_OFFLINE", "1")
    monkeypatch.setenv("ML_PROFILE", "exact")
    with running_service({"--models-dir": str(models)}) as running:
        until(lambda: health(running)["worker"]["state"] == "ready")
        yield running


def health(service: OwnService) -> dict[str, Any]:
    told: dict[str, Any] = httpx.get(f"{service.url}/health", timeout=PATIENCE_S).json()
    return told


def until(is_so: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def worker_of(service: OwnService) -> int:
    (worker,) = psutil.Process(service.pid).children()
    return int(worker.pid)


def let_take(pid: int, more_bytes: int) -> None:
    """Let a process take so much more memory than it has now."""
    limit_of(pid, resource.RLIMIT_AS, psutil.Process(pid).memory_info().vms + more_bytes)


def test_a_worker_without_memory_is_replaced_and_its_job_is_answered(service: OwnService) -> None:
    assert predict(service.url, VISUAL, image=PHOTO).status_code == 200
    first = worker_of(service)
    let_take(first, SPARE_BYTES)
    answer = predict(service.url, VISUAL, image=LARGE)
    assert answer.status_code == 200, answer.text
    assert worker_of(service) != first
    told = health(service)
    assert told["failures"]["by_cause"] == {"worker ended: out of memory": 1}
    assert told["requests"]["replayed"] == 1


def test_a_picture_for_which_no_worker_has_memory_is_condemned_alone(service: OwnService) -> None:
    idle_bytes = psutil.Process(worker_of(service)).memory_info().vms
    for pid in (service.pid, worker_of(service)):  # the next worker takes over the gateway's limit
        limit_of(pid, resource.RLIMIT_AS, idle_bytes + SPARE_BYTES)
    with concurrent.futures.ThreadPoolExecutor() as threads:
        bad = threads.submit(predict, service.url, VISUAL, image=LARGE)
        good = [threads.submit(predict, service.url, TEXTUAL, text=f"{n}") for n in range(4)]
    assert [one.result().status_code for one in good] == [200] * 4
    assert bad.result().status_code == 500, bad.result().text
    assert "(out of memory, out of memory)" in bad.result().json()["detail"]


@pytest.mark.parametrize("more", range(3))
def test_a_worker_that_can_open_no_more_files_puts_jobs_off_and_loses_none(
    service: OwnService, more: int
) -> None:
    worker = worker_of(service)
    was = limit_of(worker, resource.RLIMIT_NOFILE)
    let_open(worker, more)
    with concurrent.futures.ThreadPoolExecutor() as threads:
        waiting = [
            threads.submit(predict, service.url, TEXTUAL, text="red sea"),
            threads.submit(predict, service.url, face_entries(), image=PHOTO),
        ]
        time.sleep(3)
        assert [one.result() for one in waiting if one.done()] == []
        limit_of(worker, resource.RLIMIT_NOFILE, was)
        answers = [one.result() for one in waiting]
    assert [answer.status_code for answer in answers] == [200, 200], answers[0].text
    assert worker_of(service) == worker
    assert health(service)["requests"]["failed"] == 0


def test_a_gateway_that_can_open_no_more_files_lives_and_new_connections_wait(
    service: OwnService,
) -> None:
    was = limit_of(service.pid, resource.RLIMIT_NOFILE)
    with (
        httpx.Client(base_url=service.url, timeout=PATIENCE_S) as kept,
        concurrent.futures.ThreadPoolExecutor(20) as threads,
    ):
        assert kept.get("/ping").text == "pong"
        let_open(service.pid, 0)
        new = [threads.submit(predict, service.url, TEXTUAL, text=f"{n}") for n in range(20)]
        for _ in range(10):
            assert kept.get("/ping").text == "pong"
            assert kept.get("/health").status_code == 200
            time.sleep(0.3)
        assert not any(one.done() for one in new)
        limit_of(service.pid, resource.RLIMIT_NOFILE, was)
        assert [one.result().status_code for one in new] == [200] * 20
