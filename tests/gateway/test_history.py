"""What the page is told of the last hour."""

import pytest
from doubles.timing import Clock

from immich_ml_metal.gateway.history import STEP_S, STEPS, History, Kind, kinds_of

SEARCH = b'{"clip":{"textual":{"modelName":"m"}}}'
PICTURE = b'{"clip":{"visual":{"modelName":"m"}}}'
BOTH = b'{"facial-recognition":{"detection":{}},"ocr":{"detection":{}}}'


@pytest.mark.parametrize(
    ("head", "kinds"),
    [
        (SEARCH, (Kind.SEARCH,)),
        (PICTURE, (Kind.CLIP,)),
        (BOTH, (Kind.FACES, Kind.OCR)),
        (b"", ()),
    ],
)
def test_a_request_is_told_by_how_its_body_begins(head: bytes, kinds: tuple[Kind, ...]) -> None:
    assert kinds_of(head) == kinds


def test_answers_and_failures_are_counted_in_the_step_in_which_they_end() -> None:
    clock = Clock(1000)
    history = History(clock)
    history.note(PICTURE, 200, 0.1)
    history.note(PICTURE, 500, 0.1)
    history.note(PICTURE, None, 0.1)  # the caller hung up
    clock.now_s += STEP_S
    history.note(PICTURE, 200, 0.1)
    told = history.describe()
    clip = told["history"]["kinds"]["clip"]
    assert (clip["answered"][-2:], clip["failed"][-2:]) == ([1, 1], [1, 0])
    assert told["totals"]["clip"] == {"answered": 2, "failed": 1}
    assert told["totals"]["ocr"] == {"answered": 0, "failed": 0}


def test_an_hour_is_kept_and_no_more() -> None:
    clock = Clock(1000)
    history = History(clock)
    history.note(PICTURE, 200, 0.1)
    assert STEP_S * STEPS == 3600
    clock.now_s += STEP_S * (STEPS - 1)
    answered = history.describe()["history"]["kinds"]["clip"]["answered"]
    assert (len(answered), answered[0]) == (STEPS, 1)
    clock.now_s += STEP_S
    assert not any(history.describe()["history"]["kinds"]["clip"]["answered"])
    clock.now_s += 1e9  # asleep for years: told at once
    assert len(history.describe()["history"]["kinds"]["clip"]["answered"]) == STEPS


def test_the_time_of_searches_is_their_median() -> None:
    history = History()
    assert history.describe()["search_ms"] is None
    for seconds in (0.01, 1.5, 9.0):
        history.note(SEARCH, 200, seconds)
    history.note(SEARCH, 500, 30.0)
    history.note(PICTURE, 200, 30.0)
    assert history.describe()["search_ms"] == 1500.0


def test_the_time_of_searches_is_that_of_the_latest_twenty() -> None:
    history = History()
    for seconds in [1.0] * 10 + [2.0] * 10:
        history.note(SEARCH, 200, seconds)
    assert history.describe()["search_ms"] == 1500.0  # as many of one as of the other
    history.note(SEARCH, 200, 1.0)
    assert history.describe()["search_ms"] == 1500.0  # the first of the ten was forgotten for it


def test_rates_are_those_of_the_last_whole_half_minute_by_immichs_queues() -> None:
    clock = Clock(1000)
    history = History(clock)
    history.note(PICTURE, 200, 0.1)
    for _ in range(3):
        clock.now_s += STEP_S
        for _ in range(5):
            history.note(PICTURE, 200, 0.1)
        history.note(BOTH, 200, 0.1)
        history.note(BOTH, 500, 0.1)
        history.note(SEARCH, 200, 0.1)
    clock.now_s += STEP_S
    history.note(PICTURE, 200, 0.1)  # in a step that is not over
    expected = {"smartSearch": 15 / 30, "faceDetection": 3 / 30, "ocr": 3 / 30}
    assert history.rates() == expected
