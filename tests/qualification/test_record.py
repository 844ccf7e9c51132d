"""What is remembered of engines, and that nothing about it stops a service."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from immich_ml_metal.backends.selection import Candidate
from immich_ml_metal.qualification.record import Entry, Record, key_of, name_of
from immich_ml_metal.qualification.verdict import Figures, Judged, Outcome, Verdict
from immich_ml_metal.state import StateFolder
from immich_ml_metal.types import ModelKey, Part, Task

KEY = ModelKey(Task.CLIP, Part.VISUAL, "ViT-B-32__openai")
FLOAT16 = Candidate("mlx", "float16")
JUDGED = Judged(
    FLOAT16,
    Verdict(Outcome.WRONG, "cosine 0.99", Figures(cosine=0.99, box_px=float("inf"))),
    {"chip": "Apple M4", "mlx": "0.32.4", "model": "abc"},
)
ENTRY = Entry({"model.onnx": [7, 8]}, "abc", {FLOAT16: JUDGED}, FLOAT16, "profile balanced")


def test_what_is_written_is_read_again_by_another_process(tmp_path: Path) -> None:
    Record(StateFolder(tmp_path)).change(KEY, lambda _: ENTRY)
    found = Record(StateFolder(tmp_path)).entries()[name_of(KEY)]
    known = replace(JUDGED.verdict, figures=Figures(cosine=0.99))  # JSON has no infinity
    assert found == replace(ENTRY, judged={FLOAT16: replace(JUDGED, verdict=known)})
    assert key_of(name_of(KEY)) == KEY


def test_a_change_keeps_what_is_known_of_other_models(tmp_path: Path) -> None:
    record = Record(StateFolder(tmp_path))
    record.change(KEY, lambda _: ENTRY)
    other = replace(KEY, part=Part.TEXTUAL)
    record.change(other, lambda old: replace(old, digest="def"))
    assert record.entries()[name_of(KEY)].digest == "abc"
    assert record.entries()[name_of(other)].digest == "def"


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"version": 1, "models": {"a": 1}}', '{"version": 1, "models": 7}']
)
def test_a_damaged_document_is_told_set_aside_and_begun_anew(tmp_path: Path, content: str) -> None:
    (tmp_path / "engines.json").write_text(content)
    record = Record(StateFolder(tmp_path))
    assert record.entries() == {}
    assert "is damaged" in record.trouble
    record.change(KEY, lambda _: ENTRY)
    assert record.trouble == ""
    assert record.entries()[name_of(KEY)].digest == "abc"
    assert (tmp_path / "engines.damaged").read_text() == content


def test_figures_that_are_no_numbers_are_damage(tmp_path: Path) -> None:
    record = Record(StateFolder(tmp_path))
    record.change(KEY, lambda _: ENTRY)
    path = tmp_path / "engines.json"
    path.write_text(path.read_text().replace('"cosine": 0.99', '"cosine": "high"'))
    assert record.entries() == {}
    assert "is damaged" in record.trouble


def test_two_services_that_share_a_folder_lose_no_verdict(tmp_path: Path) -> None:
    def write(service: int) -> None:
        for number in range(20):
            key = replace(KEY, name=f"{service}-{number}")
            Record(StateFolder(tmp_path)).change(key, lambda _: ENTRY)

    with ThreadPoolExecutor(2) as services:
        list(services.map(write, range(2)))
    assert len(Record(StateFolder(tmp_path)).entries()) == 40


def test_a_document_of_a_newer_release_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "engines.json").write_text('{"version": 99}')
    record = Record(StateFolder(tmp_path))
    assert record.change(KEY, lambda _: ENTRY) == ENTRY
    assert "newer release" in record.trouble
    assert (tmp_path / "engines.json").read_text() == '{"version": 99}'


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_costs_the_memory_only(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    record = Record(StateFolder(tmp_path / "state"))
    assert record.change(KEY, lambda _: ENTRY) == ENTRY
    assert "cannot write" in record.trouble


def test_a_file_in_the_folders_place_costs_the_memory_only(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("")
    record = Record(StateFolder(tmp_path / "state"))
    assert record.change(KEY, lambda _: ENTRY) == ENTRY
    assert record.trouble
