"""Order is decided in one place, by priorities that leave a share for everybody."""

import asyncio
import ctypes
import os
import subprocess
import sys
import threading
from concurrent.futures import Future

import pytest
from hypothesis import given
from hypothesis import strategies as st

from immich_ml_metal.threads import CpuThreads, executor
from immich_ml_metal.urgency import (
    OVERTAKINGS,
    SEARCH_BYTES,
    Turns,
    Urgency,
    settle_thread,
    urgency_of,
    urgency_of_request,
)

SEARCH, TEXT, PICTURES = Urgency
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="niceness of a thread is Linux's")


def form(entries: bytes) -> bytes:
    return b'--x\r\nContent-Disposition: form-data; name="entries"\r\n\r\n' + entries


def niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


@pytest.mark.parametrize(
    ("task", "part", "expected"),
    [
        ("clip", "textual", SEARCH),
        ("clip", "visual", PICTURES),
        ("facial-recognition", "detection", PICTURES),
        ("facial-recognition", "recognition", PICTURES),
        ("ocr", "detection", TEXT),
        ("ocr", "recognition", TEXT),
    ],
)
def test_each_half_of_a_model_has_its_class(task: str, part: str, expected: Urgency) -> None:
    assert urgency_of(task, part) is expected


@pytest.mark.parametrize(
    ("head", "size_bytes", "expected"),
    [
        (form(b'{"clip":{"textual":{"modelName":"m"}}}'), 300, SEARCH),
        (form(b'{"clip":{"textual":{"modelName":"m"}}}'), SEARCH_BYTES + 1, PICTURES),
        (form(b'{"clip":{"textual":{},"visual":{}}}'), 300, PICTURES),
        (form(b'{"clip":{"visual":{"modelName":"m"}}}'), 300, PICTURES),
        (form(b'{"ocr":{"detection":{}}}'), 900_000, TEXT),
        (form(b'{"facial-recognition":{"detection":{}}}'), 900_000, PICTURES),
        (b"entries=%7B%22clip%22%3A%7B%22textual%22%3A%7B%7D%7D%7D&text=visual", 80, SEARCH),
        (b"", 0, PICTURES),
    ],
)
def test_a_request_is_classed_by_its_entries_and_only_a_small_one_is_a_search(
    head: bytes, size_bytes: int, expected: Urgency
) -> None:
    assert urgency_of_request(head, size_bytes) is expected


# -- turns -----------------------------------------------------------------------------------------


def test_the_most_urgent_comes_first_and_among_equals_who_came_first() -> None:
    assert Turns().choose([PICTURES, TEXT, SEARCH, TEXT, SEARCH]) == 2
    assert Turns().choose([PICTURES, TEXT, TEXT]) == 1
    assert Turns().choose([PICTURES, PICTURES]) == 0


@given(st.lists(st.lists(st.sampled_from(Urgency), max_size=3), min_size=1, max_size=60))
def test_nobody_is_overtaken_for_ever_whatever_else_arrives(arrivals: list[list[Urgency]]) -> None:
    turns, waiting = Turns(), [PICTURES, PICTURES]
    oldest_waited = 0
    for more in arrivals:
        waiting += more
        if not waiting:
            continue
        taken = turns.choose(waiting)
        waiting.pop(taken)
        oldest_waited = oldest_waited + 1 if taken else 0
        assert oldest_waited <= OVERTAKINGS


# -- threads ---------------------------------------------------------------------------------------


@on_linux
def test_each_class_has_threads_of_its_own_priority() -> None:
    found = {}
    for one in Urgency:
        threads = executor(one, 1, "t")
        found[one] = threads.submit(niceness).result()
        threads.shutdown()
    assert found[SEARCH] == niceness()
    assert found[SEARCH] < found[TEXT] < found[PICTURES]


@on_linux
def test_threads_that_a_library_starts_inherit_the_class() -> None:
    found: Future[int] = Future()

    def start_one() -> int:
        inner = threading.Thread(target=lambda: found.set_result(niceness()))
        inner.start()
        inner.join()
        return niceness()

    threads = executor(PICTURES, 1, "t")
    assert threads.submit(start_one).result() == found.result() > niceness()
    threads.shutdown()


SPIN = """
import sys, threading, time, zlib, os
from immich_ml_metal.urgency import Urgency, settle_thread
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
block, worked, start, over = bytes(200_000), {}, threading.Barrier(2), threading.Event()
def work(one):
    settle_thread(one)
    start.wait()
    while not over.is_set():
        zlib.crc32(block)  # leaves Python's lock, as the libraries of models do
        if one is Urgency.SEARCH and time.thread_time() > 0.7:  # seconds of work, not of the clock
            over.set()
    worked[one] = time.thread_time()
pair = [threading.Thread(target=work, args=(one,)) for one in (Urgency.SEARCH, Urgency.PICTURES)]
for thread in pair: thread.start()
for thread in pair: thread.join()
print(worked[Urgency.SEARCH], worked[Urgency.PICTURES])
"""


@on_linux
def test_on_one_core_the_more_urgent_works_more_and_the_other_goes_on() -> None:
    told = subprocess.run([sys.executable, "-c", SPIN], check=True, capture_output=True, text=True)
    search_s, pictures_s = map(float, told.stdout.split())
    assert search_s > 2 * pictures_s
    assert pictures_s > 0.01


def test_a_mac_is_asked_for_its_classes_of_service(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    class Library:
        def pthread_set_qos_class_self_np(self, qos: int, relative: int) -> int:
            asked.append((qos, relative))
            return 0

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(ctypes, "CDLL", lambda _: Library())
    for one in Urgency:
        settle_thread(one)
    qos = [each for each, _ in asked]
    assert qos == sorted(qos, reverse=True), "the more urgent has the higher class"
    assert min(qos) > 0x09, "background work is kept to the efficiency cores"


async def test_a_search_never_waits_for_the_threads_of_pictures() -> None:
    threads, gate = CpuThreads(1), threading.Event()
    busy = [asyncio.create_task(threads.run(gate.wait, one)) for one in (PICTURES, TEXT) * 3]
    await asyncio.sleep(0)
    assert await asyncio.wait_for(threads.run(lambda: 7, SEARCH), 30) == 7
    assert not any(task.done() for task in busy)
    gate.set()
    await asyncio.gather(*busy)
    threads.close()
