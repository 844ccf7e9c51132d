"""Which request goes next, and which is to blame: plain state."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from immich_ml_metal.gateway.body import Body
from immich_ml_metal.gateway.crashes import CrashRecord
from immich_ml_metal.gateway.replay import _REMEMBER_MAX, Job, JobQueue, Quarantine
from immich_ml_metal.urgency import OVERTAKINGS, Urgency


def make_jobs(count: int, queue: JobQueue) -> list[Job]:
    loop = asyncio.new_event_loop()
    jobs = [Job(number, Body(), b"", "", loop.create_future()) for number in range(count)]
    loop.close()
    for job in jobs:
        queue.add(job)
    return jobs


def test_requests_go_in_order_of_arrival_up_to_the_limit() -> None:
    queue = JobQueue()
    jobs = make_jobs(3, queue)
    assert queue.take(2) == jobs[:2]
    assert queue.take(2) == []
    queue.remove(jobs[0])
    assert queue.take(2) == [jobs[2]]


def make_urgent(urgency: Urgency, number: int, queue: JobQueue) -> Job:
    [job] = make_jobs(1, JobQueue())
    job.number, job.urgency = number, urgency
    queue.add(job)
    return job


def test_searches_pass_the_limit_but_not_without_one_of_their_own() -> None:
    queue = JobQueue()
    pictures = make_jobs(4, queue)
    assert queue.take(2) == pictures[:2]
    searches = [make_urgent(Urgency.SEARCH, 10 + number, queue) for number in range(3)]
    assert queue.take(2) == searches[:2]
    queue.remove(searches[0])
    assert queue.take(2) == [searches[2]]
    queue.remove(pictures[0])
    assert queue.take(2) == [pictures[2]], "searches take no place of the others"


SLOW = ("ocr", "broken")


@pytest.mark.parametrize(
    ("limit", "most"), [(1, 1), (2, 1), (3, 1), (5, 1), (6, 2), (9, 3), (11, 3), (12, 4)]
)
def test_requests_for_a_model_that_fails_take_a_third_of_the_places(limit: int, most: int) -> None:
    queue = JobQueue()
    jobs = make_jobs(4 * limit, queue)
    for job in jobs[: 2 * limit]:
        job.kind = SLOW
    taken = queue.take(limit, frozenset({SLOW}))
    assert taken == [*jobs[:most], *jobs[2 * limit : 3 * limit - most]]
    queue.remove(jobs[0])
    assert queue.take(limit, frozenset({SLOW})) == [jobs[most]], "its place is for the next of them"


@pytest.mark.parametrize("are_searched", [False, True], ids=["import", "import and searches"])
def test_text_overtakes_pictures_in_the_queue_but_not_for_ever(are_searched: bool) -> None:
    queue = JobQueue()
    pictures = make_jobs(2, queue)
    order: list[Job] = []
    for number in range(3 * OVERTAKINGS):
        make_urgent(Urgency.TEXT, 10 + number, queue)
        [job] = queue.take(1)
        if are_searched:
            search = make_urgent(Urgency.SEARCH, 100 + number, queue)
            assert queue.take(1) == [search]
            queue.remove(search)
        order.append(job)
        queue.remove(job)
    assert order.index(pictures[0]) == OVERTAKINGS
    assert order.index(pictures[1]) == 2 * OVERTAKINGS + 1


def test_after_a_death_the_suspects_go_one_at_a_time_before_the_others() -> None:
    queue = JobQueue()
    jobs = make_jobs(4, queue)
    queue.take(2)
    assert queue.blame_running("SIGABRT", from_outside=False) == []
    for suspect in jobs[:2]:
        assert queue.take(32) == [suspect]
        assert queue.take(32) == []
        queue.remove(suspect)
    assert queue.take(32) == jobs[2:]


def test_the_second_death_condemns_only_the_request_that_was_alone() -> None:
    queue = JobQueue()
    jobs = make_jobs(3, queue)
    queue.take(32)
    queue.blame_running("SIGABRT", from_outside=False)
    queue.take(32)
    assert queue.blame_running("SIGSEGV", from_outside=False) == [jobs[0]]
    assert jobs[0].causes == ["SIGABRT", "SIGSEGV"]
    assert queue.waiting == 2


def test_it_takes_three_kills_from_outside_to_condemn() -> None:
    queue = JobQueue()
    [job] = make_jobs(1, queue)
    condemned = []
    for _ in range(3):
        queue.take(1)
        condemned.append(queue.blame_running("SIGKILL", from_outside=True))
    assert condemned == [[], [], [job]]


def test_a_suspect_that_comes_back_waits_until_nothing_runs() -> None:
    queue = JobQueue()
    jobs = make_jobs(2, queue)
    queue.take(1)
    queue.blame_running("SIGABRT", from_outside=False)
    queue.take(32)
    queue.return_running()  # a restart that is nobody's fault
    assert queue.take(32) == [jobs[0]]
    assert (jobs[0].deaths, queue.running) == (1, 1)


@given(st.lists(st.sampled_from(["take", "answer", "death", "recycle", "new"]), max_size=60))
def test_no_request_is_ever_lost_or_doubled(steps: list[str]) -> None:
    queue = JobQueue()
    here = set(make_jobs(3, queue))
    running: list[Job] = []
    count = len(here)
    for step in steps:
        if step == "take":
            running += queue.take(4)
        elif step == "answer" and running:
            here.discard(running[0])
            queue.remove(running.pop(0))
        elif step == "death":
            here -= set(queue.blame_running("SIGABRT", from_outside=False))
            running = []
        elif step == "recycle":
            queue.return_running()
            running = []
        elif step == "new":
            [job] = make_jobs(1, JobQueue())
            job.number = count = count + 1
            queue.add(job)
            here.add(job)
        assert sorted(map(id, queue.everything())) == sorted(map(id, here))
        assert queue.running <= 4
        assert not any(job.deaths for job in running) or len(running) == 1


def test_a_quarantined_content_is_known_until_its_time_is_over() -> None:
    quarantine = Quarantine(remember_s=10)
    quarantine.add(b"digest", "SIGABRT", now_s=0)
    quarantine.forget_old(9.9)
    assert quarantine.find(b"digest") == "SIGABRT"
    quarantine.forget_old(10)
    assert quarantine.find(b"digest") is None


def test_of_too_many_quarantined_contents_the_oldest_is_forgotten() -> None:
    quarantine = Quarantine()
    digests = [number.to_bytes(4) for number in range(_REMEMBER_MAX + 1)]
    for digest in digests[:-1]:
        quarantine.add(digest, "SIGABRT", now_s=0)
    quarantine.add(digests[0], "SIGSEGV", now_s=1)  # again: it is now the latest but one
    quarantine.add(digests[-1], "SIGABRT", now_s=2)
    assert len(quarantine) == _REMEMBER_MAX
    assert quarantine.find(digests[1]) is None
    assert quarantine.find(digests[0]) == "SIGSEGV"
    assert quarantine.find(digests[-1]) == "SIGABRT"


def test_only_what_is_old_leaves_the_quarantine() -> None:
    quarantine = Quarantine(remember_s=10)
    for second, digest in enumerate((b"first", b"second", b"third")):
        quarantine.add(digest, "SIGABRT", now_s=second)
    quarantine.forget_old(11)
    assert [quarantine.find(digest) is None for digest in (b"first", b"second", b"third")] == [
        True,
        True,
        False,
    ]


def test_only_deaths_without_an_answer_in_between_make_a_crash_loop() -> None:
    crashes = CrashRecord(max_crashes=2, window_s=100)
    for answers in (True, True, False):
        crashes.note_crash("SIGSEGV", now_s=0)
        if answers:
            crashes.note_answer()
    assert not crashes.is_looping(0)
    crashes.note_crash("SIGSEGV", now_s=50)
    assert crashes.is_looping(99)
    assert not crashes.is_looping(100)  # the first one has left the window


def test_pauses_grow_from_nothing_to_a_limit() -> None:
    crashes = CrashRecord(max_crashes=5, window_s=1000)
    pauses_s = []
    for _ in range(9):
        pauses_s.append(crashes.pause_s())
        crashes.note_crash("exit status 1", now_s=0)
    assert pauses_s == [0, 0, 0.5, 1, 2, 4, 8, 15, 15]
