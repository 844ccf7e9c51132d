"""Two loopback services that really compute on the pixels, one of them deliberately different."""

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from doubles.mini_service import MiniService
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from immich_ml_metal.cli import app
from immich_ml_metal.client.calls import FaceAnswer, passed_over
from immich_ml_metal.parity.compare import (
    Comparison,
    cosine,
    face_agreement,
    iou,
    line_agreement,
    match_faces,
)
from immich_ml_metal.parity.explain import find_cause
from immich_ml_metal.parity.judge import Difference, judge, summarise
from immich_ml_metal.parity.run import questions

Serve = Callable[[MiniService], str]


@pytest.fixture
def serve(loopback: Callable[[Any], str]) -> Serve:
    return lambda service: loopback(service.app)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(7)
    for k, (w, h) in enumerate([(160, 96), (96, 160), (200, 100)]):
        coarse = rng.integers(0, 256, (6, 6, 3), np.uint8)
        Image.fromarray(coarse).resize((w, h)).save(folder / f"p{k}.png")
    return folder


def run(*args: str) -> Any:
    return CliRunner(env={"COLUMNS": "120"}).invoke(app, ["parity", *args])


def verdict(ours: str, theirs: str, photos: Path, *more: str) -> tuple[int, dict[str, Any]]:
    result = run(str(photos), "--url", ours, "--against", theirs, "--json", *more)
    assert result.exit_code in (0, 1, 4), result.output
    return result.exit_code, json.loads(result.stdout)


def test_a_service_against_itself_is_safe_to_switch(serve: Serve, photos: Path) -> None:
    url = serve(MiniService())
    code, report = verdict(url, url, photos)
    assert (code, report["verdict"]) == (0, "safe to switch")
    for task in report["tasks"].values():
        assert task["minimum"] == pytest.approx(1)
    faces = report["tasks"]["faces"]
    assert (faces["faces_both"], faces["faces_only_ours"]) == (6, 0)
    assert report["tasks"]["text"]["count"] == 3
    assert report["tasks"]["clip text"]["count"] == 10
    assert 0.05 < report["tasks"]["clip image"]["speed"] < 20


@pytest.mark.parametrize(
    ("wrong", "cause"),
    [
        (MiniService(swap_channels=True), "swaps red and blue"),
        (MiniService(crop=True), "resize rule differs"),
        (MiniService(seed=1), "other weights"),
        (MiniService(dim=32), "64 and 32 numbers"),
    ],
    ids=["bgr", "crop", "weights", "dimension"],
)
def test_a_service_that_computes_otherwise_is_not_to_be_mixed(
    serve: Serve, photos: Path, wrong: MiniService, cause: str
) -> None:
    code, report = verdict(serve(MiniService()), serve(wrong), photos)
    assert (code, report["verdict"]) == (4, "do not mix")
    assert cause in report["cause"]


def test_other_landmarks_are_safe_for_search_only(serve: Serve, photos: Path) -> None:
    code, report = verdict(serve(MiniService()), serve(MiniService(face_noise=0.2)), photos)
    assert (code, report["verdict"]) == (1, "safe for search; people may differ")
    assert 0.97 < report["tasks"]["faces"]["median"] < 0.99


def test_missed_faces_are_safe_for_search_only(serve: Serve, photos: Path) -> None:
    code, report = verdict(serve(MiniService(faces=1)), serve(MiniService(faces=3)), photos)
    assert (code, report["verdict"]) == (1, "safe for search; people may differ")
    assert report["tasks"]["faces"]["faces_only_theirs"] == 6
    assert "3 of 9 faces" in report["reasons"][0]


def test_other_text_is_safe_for_search_only(serve: Serve, photos: Path) -> None:
    code, report = verdict(serve(MiniService()), serve(MiniService(garble_text=True)), photos)
    assert (code, report["verdict"]) == (1, "safe for search; text may differ")


def test_a_side_that_fails_at_search_is_not_safe(serve: Serve, photos: Path) -> None:
    code, report = verdict(serve(MiniService()), serve(MiniService(fail=("clip",))), photos)
    assert (code, report["verdict"]) == (4, "do not mix")
    assert "answered 500" in report["tasks"]["clip image"]["problems"][0]


def test_a_picture_that_both_refuse_is_no_difference(
    serve: Serve, photos: Path, tmp_path: Path
) -> None:
    (photos / "broken.jpg").write_bytes(b"not a picture")
    url, page = serve(MiniService()), tmp_path / "r.html"
    code, report = verdict(url, url, photos, "--html", str(page))
    assert (code, report["tasks"]["clip image"]["problems"]) == (0, [])
    assert "Lowest" not in page.read_text()


def test_only_the_named_tasks_are_asked(serve: Serve, photos: Path) -> None:
    url = serve(MiniService(fail=("ocr", "facial-recognition")))
    _, report = verdict(url, url, photos, "--task", "clip text", "--text", "one dog")
    assert list(report["tasks"]) == ["clip text"]
    assert report["tasks"]["clip text"]["count"] == 1


def test_the_page_pictures_the_worst_pairs(serve: Serve, photos: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    theirs = serve(MiniService(swap_channels=True, garble_text=True))
    result = run(
        str(photos), "--url", serve(MiniService()), "--against", theirs, "--html", str(page)
    )
    text = page.read_text()
    assert result.exit_code == 4
    assert "do not mix" in result.stdout
    assert "p0.png" in text
    assert text.count("data:image/jpeg;base64,") == 9  # three pictures, three tasks
    assert "only theirs: 05.21 latot" in text
    assert "http" not in text.split("</style>")[1].replace("http://127.0.0.1", "")


def test_nobody_listening_is_said_and_is_its_own_code(photos: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    result = run(
        str(photos), "--url", f"http://127.0.0.1:{port}", "--against", "http://127.0.0.1:1"
    )
    assert result.exit_code == 3
    assert f"no service at http://127.0.0.1:{port}" in result.stderr


@pytest.mark.parametrize("wrong", [["--task", "people"], ["/no/such/photo.jpg"]])
def test_a_wrong_option_is_a_usage_error(photos: Path, wrong: list[str]) -> None:
    assert run(str(photos), "--against", "http://127.0.0.1:1", *wrong).exit_code == 2


# -- the maths ------------------------------------------------------------------------------------


def floats(*rows: list[float]) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.array(rows, np.float32)


def test_overlap_of_boxes() -> None:
    overlaps = iou(floats([0, 0, 10, 10]), floats([0, 0, 10, 10], [5, 0, 15, 10], [20, 20, 30, 30]))
    assert overlaps[0] == pytest.approx([1, 1 / 3, 0])


def test_each_face_is_matched_at_most_once_best_first() -> None:
    ours = FaceAnswer(floats([0, 0, 10, 10], [0, 0, 10, 9]), floats([1, 0], [0, 1]))
    theirs = FaceAnswer(floats([0, 0, 10, 9]), floats([0, 1]))
    match = match_faces(ours, theirs)
    assert match.pairs == ((1, 0),)
    assert (match.only_ours, match.only_theirs) == (1, 0)
    assert match.cosines == (1.0,)
    assert face_agreement(match) == pytest.approx(0.5)


def test_no_faces_on_either_side_agree() -> None:
    nothing = FaceAnswer(floats().reshape(0, 4), floats().reshape(0, 512))
    assert face_agreement(match_faces(nothing, nothing)) == 1.0


def test_line_agreement_ignores_order_and_counts_repeats() -> None:
    assert line_agreement(["a", "b"], ["b", "a"]) == 1
    assert line_agreement(["a", "a"], ["a"]) == pytest.approx(2 / 3)
    assert line_agreement([], []) == 1
    assert line_agreement(["a"], []) == 0


@given(st.lists(st.text(max_size=3)), st.lists(st.text(max_size=3)))
def test_line_agreement_is_symmetric_and_bounded(a: list[str], b: list[str]) -> None:
    assert 0 <= line_agreement(a, b) == line_agreement(b, a) <= 1


def test_vectors_of_different_length_do_not_agree() -> None:
    assert cosine(np.ones(4, np.float32), np.ones(5, np.float32)) == 0
    assert cosine(np.zeros(4, np.float32), np.ones(4, np.float32)) == 0


def test_one_bad_picture_in_many_is_enough() -> None:
    good = [Comparison("clip image", str(i), 1.0, 1, 2) for i in range(99)]
    summary = summarise("clip image", [*good, Comparison("clip image", "bad", 0.9, 1, 2)])
    assert summary.level is Difference.UNSAFE
    assert summary.speed == 2
    assert summary.p5 == 1
    assert "0.9000" in summary.reason


@pytest.mark.parametrize(
    ("task", "level"),
    [
        ("clip image", Difference.UNSAFE),
        ("clip text", Difference.UNSAFE),
        ("text", Difference.DIFFERS),
    ],
)
def test_an_answer_that_only_one_side_gives_is_a_difference(task: str, level: Difference) -> None:
    good = [Comparison(task, str(i), 1.0, 1, 1) for i in range(9)]
    lost = Comparison(task, "lost", None, 0, 0, problem="theirs answered 500")
    summary = summarise(task, [*good, lost])
    assert summary.level is level
    assert summary.reason == "1 answered by one side only"


def test_nothing_compared_is_not_called_safe() -> None:
    assert judge([summarise("faces", [])]).words == "nothing could be compared"


def test_nothing_is_called_safe_that_was_not_compared() -> None:
    same = [Comparison("clip text", "dog", 1.0, 1, 1)]
    summaries = [summarise("clip text", same), summarise("clip image", [])]
    verdict = judge(summaries)
    assert verdict.level is Difference.UNKNOWN
    assert "safe to switch" not in verdict.words
    assert "clip image" in verdict.words
    assert judge(summaries[:1]).level is Difference.SAFE


def test_a_picture_that_has_gone_is_named_and_the_others_are_asked(tmp_path: Path) -> None:
    (tmp_path / "b.jpg").write_bytes(b"picture")
    told: list[OSError] = []
    photos = [tmp_path / "a.jpg", tmp_path / "b.jpg"]
    asked = list(questions(photos, (), ("faces",), told.append))
    assert [question.payload for question in asked] == [b"picture"]
    assert [exc.filename for exc in told] == [str(photos[0])]


def test_a_picture_that_has_gone_since_explains_nothing(tmp_path: Path) -> None:
    gone = Comparison("clip image", str(tmp_path / "a.jpg"), 0.1, 0, 0)
    summary = summarise("clip image", [gone])
    nobody: Any = None
    assert "a.jpg: No such file" in find_cause([gone], [summary], nobody, nobody)


def test_files_that_are_no_pictures_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.heic").write_text("not a picture")
    (tmp_path / "b.jpg").write_text("x")
    assert passed_over([tmp_path]) == [tmp_path / "a.heic"]
    assert passed_over([tmp_path / "a.heic"]) == []
