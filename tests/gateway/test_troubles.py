"""What counts as a trouble of a task, who is held for it, and what is told of refusals."""

import json
import logging

import pytest

from immich_ml_metal import errors
from immich_ml_metal.gateway import troubles as module
from immich_ml_metal.gateway.asked import Asked, read_asked
from immich_ml_metal.gateway.client import ERROR_HEADER, WorkerAnswer
from immich_ml_metal.gateway.troubles import FEW, LASTING, Refused, Troubles
from immich_ml_metal.worker.server import ERROR_HEADER as SENT_HEADER

CLIP = Asked(("clip",), "ViT-B-32__openai")
KB = 1024


def answer(status: int, error: str = "", *, again: bool = False) -> WorkerAnswer:
    headers = [(b"x-ml-error", error.encode())] if error else []
    headers += [(b"retry-after", b"5")] if again else []
    return WorkerAnswer(status, headers, json.dumps({"detail": f"{error} as told"}).encode())


def test_the_worker_names_its_failures_as_the_gateway_reads_them() -> None:
    assert SENT_HEADER.lower().encode() == ERROR_HEADER
    assert all(issubclass(getattr(errors, name), errors.ServiceError) for name in LASTING)


MISSING = answer(503, "ModelUnavailable")


def fail(troubles: Troubles, asked: Asked = CLIP, count: int = 1) -> None:
    for _ in range(count):
        troubles.note_answer(asked, MISSING)


@pytest.mark.parametrize(
    ("head", "asked"),
    [
        (
            b'--x\r\nname="entries"\r\n\r\n{"ocr":{"detection":{"modelName":"PP-OCRv5_mobile"}}}',
            Asked(("ocr",), "PP-OCRv5_mobile"),
        ),
        (b'{"clip":{"textual":{"modelName":"m"}}}', Asked(("clip",), "m", is_search=True)),
        (b"\x00garbage", Asked()),
    ],
)
def test_what_is_asked_for_is_read_from_the_beginning(head: bytes, asked: Asked) -> None:
    assert read_asked(head) == asked


def test_the_first_failures_in_a_row_are_answered_at_once_and_the_next_is_held() -> None:
    troubles = Troubles(KB)
    fail(troubles, count=FEW - 1)
    assert troubles.find_holding(CLIP, 1) is None
    fail(troubles)
    held = troubles.find_holding(CLIP, 1)
    assert held is not None
    assert held.reason == "answered 503: ModelUnavailable as told"


def test_jobs_of_a_guarded_immich_are_held_from_the_first_failure_on() -> None:
    troubles = Troubles(KB)
    troubles.expect({"clip": CLIP.model})
    fail(troubles)
    assert troubles.find_holding(CLIP, 1) is not None
    assert troubles.lasting() == {"clip": (CLIP.model, "answered 503: ModelUnavailable as told")}


def test_a_model_that_immich_does_not_ask_for_pauses_nothing() -> None:
    troubles = Troubles(KB)
    troubles.expect({"clip": "another"})
    fail(troubles, count=9)
    assert troubles.lasting() == {}


def test_a_good_answer_lets_everybody_go_on() -> None:
    troubles = Troubles(KB)
    fail(troubles, count=FEW)
    held = troubles.find_holding(CLIP, 1)
    assert held is not None
    troubles.note_answer(CLIP, answer(200))
    assert held.mended.is_set()
    assert list(troubles) == []


def test_searches_and_other_models_are_not_held() -> None:
    troubles = Troubles(KB)
    fail(troubles, count=FEW)
    assert troubles.find_holding(Asked(("clip",), CLIP.model, is_search=True), 1) is None
    assert troubles.find_holding(Asked(("clip",), "another"), 1) is None


def test_what_is_held_takes_no_more_than_its_share() -> None:
    troubles = Troubles(10)
    fail(troubles, count=FEW)
    held = troubles.find_holding(CLIP, 6)
    assert held is not None
    with troubles.held(held, 6):
        assert troubles.find_holding(CLIP, 4) is not None
        assert troubles.find_holding(CLIP, 5) is None
    assert troubles.find_holding(CLIP, 5) is not None


def test_a_bad_picture_is_no_trouble_of_its_task() -> None:
    troubles = Troubles(KB)
    for _ in range(2 * FEW):
        troubles.note_answer(CLIP, answer(400, "InvalidImage"))
    assert list(troubles) == []


def test_failures_of_an_engine_are_only_suspected_until_a_try_of_our_own_fails() -> None:
    troubles = Troubles(KB)
    troubles.expect({"clip": CLIP.model})
    for _ in range(FEW):
        troubles.note_answer(CLIP, answer(500, "InferenceError"))
    (suspect,) = troubles.suspects()
    assert troubles.lasting() == {}
    assert troubles.find_holding(CLIP, 1) is None
    suspect.is_confirmed = True
    assert set(troubles.lasting()) == {"clip"}


def test_a_download_that_fails_is_a_trouble_only_after_a_minute(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    troubles = Troubles(KB)
    troubles.expect({"clip": CLIP.model})
    troubles.note_answer(CLIP, answer(503, "DownloadFailed", again=True))
    assert troubles.lasting() == {}
    assert troubles.suspects() == []
    monkeypatch.setattr(module, "PASSING_S", 0.0)
    assert set(troubles.lasting()) == {"clip"}


def test_a_trouble_that_nobody_asks_for_any_more_is_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    troubles = Troubles(KB)
    fail(troubles, count=FEW)
    assert troubles.slow_jobs() == {("clip", CLIP.model)}
    monkeypatch.setattr(module, "FORGOTTEN_S", -1.0)
    assert list(troubles) == []


def test_the_end_lets_go_of_whoever_is_held() -> None:
    troubles = Troubles(KB)
    fail(troubles, count=FEW)
    (trouble,) = troubles
    troubles.end()
    assert trouble.mended.is_set()
    assert troubles.find_holding(CLIP, 1) is None


def test_a_flood_of_refusals_is_one_line_with_a_count(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    refused = Refused()
    for number in range(500):
        refused.note(400, f"picture {number} is no picture")
    refused.note(422, "no official model")
    assert [record.getMessage().split("reason")[0] for record in caplog.records] == [
        "refused, and Immich does not ask again status=400 count=1 ",
        "refused, and Immich does not ask again status=422 count=1 ",
    ]
    assert refused.describe()["400"]["count"] == 500
    assert refused.describe()["400"]["last_reason"] == "picture 499 is no picture"
