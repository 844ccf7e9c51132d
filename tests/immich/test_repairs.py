"""When a missing run is due: settled outages, second ones, and photos that always fail."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from immich_ml_metal.immich.repairs import LONGEST_REST_S, Repair

SETTLED_S = 60.0
FIRST_REST_S = 60.0
T0_S = 1_000_000.0


def lose(repair: Repair, count: int, now_s: float) -> None:
    for _ in range(count):
        repair.count_lost(now_s)


def is_due(repair: Repair, now_s: float) -> bool:
    return repair.is_due(now_s, SETTLED_S)


def run(repair: Repair, now_s: float, *, failing: int) -> None:
    """A run that is asked for and drains within ten seconds; `failing` of its photos fail."""
    repair.asked(now_s)
    lose(repair, failing, now_s + 5)
    repair.drained(now_s + 10, FIRST_REST_S)


def test_nothing_lost_means_nothing_due() -> None:
    assert not is_due(Repair(), T0_S)


def test_a_run_is_due_once_nothing_has_failed_for_a_while_with_or_without_good_answers() -> None:
    repair = Repair()
    lose(repair, 79, T0_S)
    assert not is_due(repair, T0_S + 59)
    assert is_due(repair, T0_S + 60)


def test_a_new_failure_starts_the_wait_again() -> None:
    repair = Repair()
    lose(repair, 1, T0_S)
    lose(repair, 1, T0_S + 50)
    assert not is_due(repair, T0_S + 100)
    assert is_due(repair, T0_S + 110)


def test_a_second_outage_is_repaired_without_waiting_an_hour() -> None:
    repair = Repair()
    lose(repair, 226, T0_S)
    run(repair, T0_S + 60, failing=0)
    lose(repair, 3, T0_S + 100)
    assert is_due(repair, T0_S + 160)


def test_a_photo_that_always_fails_is_asked_for_ever_more_rarely() -> None:
    repair, now_s, pauses = Repair(), T0_S, []
    lose(repair, 1, now_s)
    for _ in range(14):
        started_s = now_s
        while not is_due(repair, now_s):
            now_s += 10
        pauses.append(now_s - started_s)
        run(repair, now_s, failing=1)
        now_s += 10
    assert all(later >= earlier for earlier, later in pairwise(pauses))
    assert pauses[-1] >= LONGEST_REST_S - 20
    assert pauses[1] < 130


def test_more_failures_than_the_last_run_had_are_a_new_outage() -> None:
    repair = Repair()
    lose(repair, 1, T0_S)
    for turn in range(8):
        run(repair, T0_S + 60 + turn * 100_000, failing=1)
    now_s = T0_S + 60 + 7 * 100_000 + 20
    assert not is_due(repair, now_s + 100)
    lose(repair, 5, now_s)
    assert is_due(repair, now_s + 60)


def test_after_an_unplanned_end_a_run_is_due_whatever_was_counted() -> None:
    repair = Repair(reason="an unplanned end", rests_until_s=T0_S + 1000)
    assert is_due(repair, T0_S)


def test_nothing_is_asked_while_a_run_has_not_drained() -> None:
    repair = Repair()
    lose(repair, 1, T0_S)
    repair.asked(T0_S + 60)
    lose(repair, 9, T0_S + 61)
    assert not is_due(repair, T0_S + 1000)


def test_a_clock_that_is_put_back_delays_no_run() -> None:
    repair, year_s = Repair(), 31_536_000
    lose(repair, 1, T0_S)
    assert is_due(repair, T0_S - year_s)
    run(repair, T0_S, failing=1)
    assert is_due(repair, T0_S - year_s)


@given(st.lists(st.tuples(st.integers(0, 3), st.floats(0, 5000)), max_size=40))
def test_a_task_whose_runs_keep_failing_never_rests_longer_than_a_day(
    steps: list[tuple[int, float]],
) -> None:
    repair, now_s = Repair(), T0_S
    for failing, wait_s in steps:
        now_s += wait_s
        lose(repair, failing, now_s)
        if is_due(repair, now_s):
            run(repair, now_s, failing=failing)
    assert is_due(repair, now_s + LONGEST_REST_S + 100) or not repair.is_wanted
