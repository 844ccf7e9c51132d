"""When a worker counts as stuck, and when as too big."""

import os
from types import SimpleNamespace
from typing import Any

import pytest
from doubles.gateway import settings

from immich_ml_metal.gateway.watch import ProgressWatch, Watch, has_preload, progress_mark


def observe(watch: ProgressWatch, now_s: float, mark: int = 0, **flags: bool) -> bool:
    chosen = {"busy": True, "loading": False, **flags}
    return watch.observe(mark=mark, now_s=now_s, **chosen)


def test_a_busy_worker_without_progress_is_stuck_after_the_limit() -> None:
    watch = ProgressWatch(limit_s=10)
    assert [observe(watch, now_s) for now_s in (0, 5, 9.9, 10)] == [False, False, False, True]


def test_any_progress_starts_the_time_again() -> None:
    watch = ProgressWatch(limit_s=10)
    assert not any(observe(watch, now_s, mark=now_s // 9) for now_s in range(60))


def test_an_idle_worker_is_never_stuck() -> None:
    watch = ProgressWatch(limit_s=10)
    assert not any(observe(watch, now_s, busy=False) for now_s in range(60))
    assert not observe(watch, 60)  # its first request begins only now


def test_a_loading_worker_has_longer() -> None:
    watch = ProgressWatch(limit_s=10, load_limit_s=40)
    stuck = [observe(watch, now_s, loading=True) for now_s in range(0, 50, 5)]
    assert stuck.index(True) * 5 == 40


def test_the_time_that_the_machine_slept_does_not_count() -> None:
    watch = ProgressWatch(limit_s=10)
    assert [observe(watch, now_s) for now_s in (0, 5, 3600, 3605, 3610)] == [False] * 4 + [True]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [({}, False), ({"preload_ocr_detection": ("x",)}, True)],
)
def test_only_named_models_count_as_preload(changes: dict[str, object], expected: bool) -> None:
    assert has_preload(settings(**changes)) is expected


def test_bytes_of_a_download_are_progress_and_its_time_is_not() -> None:
    download = {"model": "x", "done_bytes": 1, "remaining_s": 9.0}
    before = progress_mark({"progress": 1, "downloads": [download]})
    assert progress_mark({"progress": 1, "downloads": [{**download, "remaining_s": 8.0}]}) == before
    assert progress_mark({"progress": 1, "downloads": [{**download, "done_bytes": 2}]}) != before
    assert progress_mark({"progress": 2, "downloads": [download]}) != before


class OneWorker:
    """In a dispatcher's place: this process as the worker, and the orders that it was given."""

    def __init__(self, started_s: float) -> None:
        worker = SimpleNamespace(pid=os.getpid(), started_s=started_s)
        self.supervisor = SimpleNamespace(worker=worker)
        self.orders: list[str] = []

    def recycle(self, order: Any) -> None:
        self.orders.append(order.reason)


@pytest.mark.parametrize(
    ("age_s", "limit_bytes", "orders"),
    [
        (0.0, 1, []),
        (59.9, 1, []),
        (60.0, 1, ["memory"]),
        (60.0, 2**60, []),
        (60.0, 0, []),  # no limit
    ],
)
def test_a_worker_over_its_limit_is_recycled_once_it_is_a_minute_old(
    age_s: float, limit_bytes: int, orders: list[str]
) -> None:
    dispatcher: Any = OneWorker(started_s=1000.0)
    watch = Watch(settings(memory_limit_bytes=limit_bytes), dispatcher)
    watch.measure()
    watch._check_memory(1000.0 + age_s)
    assert dispatcher.orders == orders
