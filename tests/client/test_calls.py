"""The calls that our commands make are those of Immich's server (contract §1.4)."""

import os
from pathlib import Path
from typing import Any

import pytest

from immich_ml_metal.client.calls import (
    Call,
    configured_names,
    encode,
    find_photos,
    immich_calls,
    passed_over,
)
from immich_ml_metal.settings import Settings
from immich_ml_metal.types import Part, TaskRequest
from immich_ml_metal.worker.wire import parse_entries


@pytest.fixture
def calls() -> dict[str, Call]:
    names = {"clip_model": "RN50::openai", "face_model": "buffalo_s", "ocr_model": "PP-OCRv6_tiny"}
    return immich_calls(configured_names(Settings.model_validate(names)))


def asked(call: Call) -> TaskRequest:
    fields = call.form(b"x" if call.takes_image else "y")
    return parse_entries(fields["data"]["entries"], face_min_score=0.1)


def test_every_call_asks_for_the_configured_model(calls: dict[str, Call]) -> None:
    image, text = asked(calls["clip image"]), asked(calls["clip text"])
    assert image.clip_visual is not None
    assert text.clip_textual is not None
    assert (image.clip_visual.model.name, image.clip_visual.model.part) == (
        "RN50__openai",
        Part.VISUAL,
    )
    assert (text.clip_textual.model.name, text.clip_textual.language) == ("RN50__openai", "en")


def test_faces_and_text_are_asked_for_with_immichs_thresholds(calls: dict[str, Call]) -> None:
    faces, text = asked(calls["faces"]), asked(calls["text"])
    assert faces.face_detection is not None
    assert faces.face_recognition is not None
    assert (faces.face_detection.model.name, faces.face_detection.min_score) == ("buffalo_s", 0.7)
    assert text.text_detection is not None
    assert text.text_recognition is not None
    assert (text.text_detection.min_score, text.text_detection.max_resolution) == (0.5, 736)
    assert text.text_recognition.min_score == 0.8


def test_a_picture_is_sent_as_an_unnamed_file(calls: dict[str, Call]) -> None:
    request = encode(calls["faces"], b"\x00\xffpixels")
    body = request.content
    assert request.url.path == "/predict"
    assert request.headers["content-type"].startswith("multipart/form-data; boundary=")
    assert body.index(b'name="entries"') < body.index(b'name="image"; filename="blob"')
    assert b"Content-Type: application/octet-stream\r\n\r\n\x00\xffpixels\r\n" in body


def test_a_text_is_sent_without_a_file(calls: dict[str, Call]) -> None:
    request = encode(calls["clip text"], "Gruß & Kuss")
    field = 'Content-Disposition: form-data; name="text"\r\n\r\nGruß & Kuss\r\n'
    assert field.encode() in request.content
    assert b"filename" not in request.content


def test_folders_give_their_pictures_once_in_order(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    for name in ("b.jpg", "a.JPG", "notes.md", ".DS_Store", "sub/c.png"):
        (folder / name).write_bytes(b"")
    (tmp_path / "x").write_bytes(b"")
    found = find_photos([tmp_path / "x", folder, folder / "b.jpg"])
    assert [path.name for path in found] == ["x", "a.JPG", "b.jpg", "c.png"]
    assert find_photos([]) == []


@pytest.mark.parametrize(("failure", "told"), [(FileNotFoundError, 0), (PermissionError, 1)])
def test_a_folder_below_may_go_during_the_walk_and_a_closed_one_is_named(
    failure: type[OSError], told: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    below = tmp_path / "below"
    below.mkdir()
    (tmp_path / "a.jpg").write_bytes(b"")
    scan = os.scandir

    def scandir(place: Any) -> Any:
        if Path(place) == below:
            raise failure(1, "refused", str(place))
        return scan(place)

    monkeypatch.setattr(os, "scandir", scandir)
    assert find_photos([tmp_path]) == [tmp_path / "a.jpg"]
    assert passed_over([tmp_path]) == [below] * told
