import logging

import pytest
from doubles.timing import Clock

from immich_ml_metal.catalog import model_key
from immich_ml_metal.errors import DownloadFailed
from immich_ml_metal.models.progress import Downloads, Phase, Tracker
from immich_ml_metal.setting_kinds import format_bytes
from immich_ml_metal.types import Part, Task

KEY = model_key("buffalo_l", Task.FACES, Part.RECOGNITION)


def test_rate_and_remaining_time_count_only_what_was_received_now() -> None:
    clock = Clock()
    tracker = Tracker(KEY, clock=clock)
    tracker.begin(1000, 400)
    clock.now_s += 2
    tracker.advance(200)
    progress = tracker.snapshot()
    assert (progress.done_bytes, progress.total_bytes) == (600, 1000)
    assert progress.rate_bytes_s == 100
    assert progress.remaining_s == 4


def test_health_gets_plain_numbers() -> None:
    clock = Clock()
    tracker = Tracker(KEY, clock=clock)
    tracker.begin(1000, 0)
    clock.now_s += 3
    tracker.advance(300)
    assert tracker.snapshot().describe() == {
        "model": "buffalo_l/recognition",
        "phase": "downloading",
        "done_bytes": 300,
        "total_bytes": 1000,
        "rate_bytes_s": 100,
        "remaining_s": 7.0,
        "note": None,
    }


def test_nothing_is_estimated_before_anything_is_known() -> None:
    tracker = Tracker(KEY, clock=Clock())
    assert tracker.snapshot().phase is Phase.STARTING
    assert tracker.snapshot().remaining_s is None


def test_the_log_gets_a_line_every_ten_seconds_and_not_more(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = Clock()
    tracker = Tracker(KEY, clock=clock)
    tracker.begin(174_400_000, 0)
    with caplog.at_level(logging.INFO):
        for _ in range(100):
            clock.now_s += 0.25
            tracker.advance(1_000_000)
    assert [record.message for record in caplog.records] == [
        "downloading buffalo_l/recognition: 23 % of 174 MB at 4.0 MB/s",
        "downloading buffalo_l/recognition: 46 % of 174 MB at 4.0 MB/s",
    ]


def test_a_pause_is_told_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    tracker = Tracker(KEY, clock=Clock())
    tracker.retry("the server answered 429", 0.0)
    assert tracker.snapshot().phase is Phase.RETRYING
    assert tracker.snapshot().note == "the server answered 429"
    assert "the server answered 429; trying again in 0.0 s" in caplog.text
    tracker.advance(1)
    assert tracker.snapshot().note is None


def test_stopping_ends_a_pause_at_once() -> None:
    tracker = Tracker(KEY, clock=Clock())
    tracker.stop()
    with pytest.raises(DownloadFailed, match="goes on from there next time"):
        tracker.retry("anything", 3600.0)


def test_running_downloads_are_listed_oldest_first() -> None:
    downloads = Downloads()
    other = model_key("buffalo_l", Task.FACES, Part.DETECTION)
    with downloads.track(KEY), downloads.track(other):
        assert [progress.key for progress in downloads.snapshot()] == [KEY, other]
    assert downloads.snapshot() == ()


def test_a_download_that_starts_after_closing_is_stopped() -> None:
    downloads = Downloads()
    downloads.close()
    with downloads.track(KEY) as tracker, pytest.raises(DownloadFailed):
        tracker.raise_if_stopped()


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1_500, "1.5 kB"),
        (351_400_000, "351 MB"),
        (2_240_000_000, "2.2 GB"),
        (5_000_000_000_000, "5000.0 GB"),
    ],
)
def test_sizes_are_written_for_people(size: int, text: str) -> None:
    assert format_bytes(size) == text
