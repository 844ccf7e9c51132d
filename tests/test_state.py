"""What is remembered survives crashes, is never guessed, and never comes from a newer release."""

import os
import re
from pathlib import Path

import pytest

from immich_ml_metal.settings import Settings
from immich_ml_metal.settings_sources import load_settings
from immich_ml_metal.state import StateFolder, StateUnusable


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
    with pytest.raises(StateUnusable, match="No space left"):
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
