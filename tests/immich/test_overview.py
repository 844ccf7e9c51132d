"""What `immich status` shows: rates, time left, who paused and what fails."""

from io import StringIO
from typing import Any

from doubles.immich import CONFIG
from rich.console import Console

from immich_ml_metal.cli.immich_show import queue_table, show, spell_time
from immich_ml_metal.immich.api import QueueCounts, parse_settings
from immich_ml_metal.immich.overview import Overview, overlook
from immich_ml_metal.immich.records import Pause, Records

SERVER = parse_settings(CONFIG)
HEALTH: dict[str, Any] = {
    "rates": {"smartSearch": 4.0, "faceDetection": 0.0, "ocr": 0.5},
    "troubles": [
        {
            "task": "facial-recognition",
            "model": "buffalo_l",
            "reason": "answered 503: not here",
            "since": "10:00",
            "in_row": 3,
            "held": 2,
        }
    ],
    "failures": {"by_cause": {"the worker answered 503: not here": 3}},
    "refused": {"400": {"count": 7, "last_reason": "no picture", "last_when": "10:01"}},
    "guard": {
        "why_off": "",
        "missing_runs": {
            "smartSearch": {
                "wanted_for": "an unplanned end",
                "waits_for": "it works",
                "last_asked_s_ago": None,
                "is_running": False,
            }
        },
    },
}


def view(**paused: str) -> Overview:
    queues = {
        "clip": QueueCounts(2, 1200, 0, is_paused=False),
        "facial-recognition": QueueCounts(0, 5, 0, is_paused=bool(paused)),
        "ocr": QueueCounts(0, 0, 0, is_paused=False),
        "duplicateDetection": QueueCounts(0, 0, 0, is_paused=False),
    }
    records = Records(
        paused={task: Pause(reason, "10:00") for task, reason in paused.items()},
        unplanned_end="2026-11-25T10:00:00",
    )
    return overlook(SERVER, queues, HEALTH, records)


def printed(what: Any) -> str:
    out = StringIO()
    Console(file=out, width=200, highlight=False).print(what)
    return out.getvalue()


def test_a_queue_shows_its_rate_and_the_time_left() -> None:
    clip = view().queues[0]
    assert (clip.per_s, clip.left_s) == (4.0, 300.0)
    assert "5 min" in printed(queue_table(view()))


def test_a_task_that_fails_says_since_when_and_why() -> None:
    faces = view().queues[1]
    assert faces.why == "buffalo_l answered 503: not here, 3 in a row since 10:00"
    assert faces.paused_by == ""


def test_a_pause_says_whose_it_is() -> None:
    queues = {"ocr": QueueCounts(0, 5, 0, is_paused=True)}
    assert overlook(SERVER, queues, None, Records()).queues[0].paused_by == "somebody else"
    ours = Records(paused={"ocr": Pause("not here", "10:00")})
    (ocr,) = overlook(SERVER, queues, None, ours).queues
    assert (ocr.paused_by, ocr.why, ocr.left_s) == ("us", "not here, since 10:00", None)


def test_the_page_tells_what_was_lost_refused_and_asked_for() -> None:
    text = printed(show(view(), 3, [], "Immich 3.1.0"))
    for words in (
        "looking after the queues: on",
        "answers we failed: 3 since our start",
        "last unplanned end: 2026-11-25T10:00:00",
        "3 x the worker answered 503: not here",
        "refused with 400: 7, last: no picture",
        "missing results will be asked for after an unplanned end",
    ):
        assert words in text


def test_a_watched_queue_shows_a_bar_of_what_is_done_since_the_beginning() -> None:
    most = {"clip": 2404}
    bars = printed(queue_table(view(), most)).splitlines()
    clip = next(line for line in bars if line.lstrip().startswith("clip"))
    assert clip.count("━") > 5
    assert most["facial-recognition"] == 5


def test_times_are_spelled_for_people() -> None:
    assert [spell_time(s) for s in (45, 700, 12_000)] == ["45 s", "12 min", "3 h 20 min"]
