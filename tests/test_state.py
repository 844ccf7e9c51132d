"""What is remembered survives crashes, is never guessed, and never comes from a newer release."""

import os
import re
from pathlib import Path

import pytest

from immich_ml_metal.immich.records import Records
from immich_ml_metal.index_guard.history import History
from immich_ml_metal.index_guard.recipe import Recipe
from immich_ml_metal.qualification.record import Record
from immich_ml_metal.service.traces import DOCUMENTS
from immich_ml_metal.settings import Settings
from immich_ml_metal.settings_sources import load_settings
from immich_ml_metal.state import StateFolder, StateUnusable
from immich_ml_metal.types import ModelKey, Part, Task


def test_what_was_written_is_read_again(tmp_path: Path) -> None:
    state = StateFolder(tmp_path / "new")
    assert state.read("plan", 1) is None
    assert not (tmp_path / "new").exists()
    state.write("plan", 1, {"engine": "cpu"})
    assert state.read("plan", 1) == {"version": 1, "engine": "cpu"}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["plan.json"]


def test_an_older_document_is_read_and_a_newer_one_refused(tmp_path: Path) -> None:
    state = StateFolder(tmp_path)
    state.write("plan", 2, {})
    assert state.read("plan", 3) == {"version": 2}
    with pytest.raises(StateUnusable, match=r"newer release \(version 2, this one reads 1\)"):
        state.read("plan", 1)


def test_a_newer_document_is_never_overwritten(tmp_path: Path) -> None:
    state = StateFolder(tmp_path)
    state.write("plan", 2, {"kept": True})
    with pytest.raises(StateUnusable, match="newer release"):
        state.write("plan", 1, {})
    assert state.read("plan", 2) == {"version": 2, "kept": True}


def remember_an_index(folder: Path) -> str:
    History(StateFolder(folder)).remember("clip/x", Recipe("main", "3.3", "", {}))
    return ""


def accept_a_change(folder: Path) -> str:
    try:
        History(StateFolder(folder)).accept("clip/x")
    except StateUnusable as exc:
        return str(exc)
    return ""


def judge_an_engine(folder: Path) -> str:
    record = Record(StateFolder(folder))
    record.change(ModelKey(Task.CLIP, Part.VISUAL, "x"), lambda entry: entry)
    return record.trouble


def release_queues(folder: Path) -> str:
    try:
        Records.load(StateFolder(folder))
    except StateUnusable as exc:
        return str(exc)
    return ""


OWNERS = {
    "index": remember_an_index,
    "index-accepted": accept_a_change,
    "engines": judge_an_engine,
    "guard": release_queues,
}


def test_every_document_that_a_purge_removes_has_its_versions_tested() -> None:
    assert set(OWNERS) == set(DOCUMENTS)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_owner_leaves_a_newer_document_alone_and_says_so(
    document: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / f"{document}.json"
    path.write_text('{"version": 99, "models": {}}')
    said = OWNERS[document](tmp_path) + caplog.text
    assert f"{path} was written by a newer release (version 99" in said
    assert path.read_text() == '{"version": 99, "models": {}}'


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_owner_reads_an_older_document(
    document: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / f"{document}.json").write_text('{"version": 0}')
    assert OWNERS[document](tmp_path) + caplog.text == ""
    assert not list(tmp_path.glob("*.damaged"))


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"version": "x"}', "[" * 100_000])
def test_a_damaged_document_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(StateUnusable, match=re.escape(f"{tmp_path}/plan.json is damaged")):
        StateFolder(tmp_path).read("plan", 1)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StateUnusable, match=r"cannot write .*file/plan\.json: "):
        StateFolder(tmp_path / "file").write("plan", 1, {})


def test_a_failed_write_leaves_the_old_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = StateFolder(tmp_path)
    state.write("plan", 1, {"engine": "cpu"})

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        StateUnusable, match=r"the disk is full while writing .*plan\.json; .* set ML_STATE_DIR"
    ):
        state.write("plan", 1, {"engine": "mlx"})
    assert state.read("plan", 1) == {"version": 1, "engine": "cpu"}
    assert len(list(tmp_path.iterdir())) == 1


def test_a_change_sees_what_is_there(tmp_path: Path) -> None:
    state = StateFolder(tmp_path)
    for _ in range(2):
        state.change("count", 1, lambda old: {"n": old.get("n", 0) + 1})
    assert state.read("count", 1) == {"version": 1, "n": 2}


def test_the_folder_is_a_setting(tmp_path: Path) -> None:
    settings = load_settings(environ={"ML_STATE_DIR": str(tmp_path)})
    assert settings.state_folder == tmp_path
    assert Settings().state_folder.name == "immich-ml-metal"
