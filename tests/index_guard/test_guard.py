"""Switching what makes vectors: said once, and what the index has goes on until it is accepted."""

import json
import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
import pytest
from doubles.files import no_more_files
from doubles.live import VISUAL as VISUAL_ENTRY
from doubles.live import numbers, predict, serve
from doubles.tiny_models import CLIP, FACES, draw_faces, make_models
from onnx import TensorProto, helper, numpy_helper

from immich_ml_metal.errors import Busy, ModelUnavailable
from immich_ml_metal.index_guard.guard import IndexFinding, IndexGuard
from immich_ml_metal.index_guard.history import History
from immich_ml_metal.models.store import ModelStore
from immich_ml_metal.settings import Settings
from immich_ml_metal.state import StateFolder
from immich_ml_metal.types import ModelFiles, ModelKey, Part, Task
from immich_ml_metal.worker.compose import build_app

VISUAL = ModelKey(Task.CLIP, Part.VISUAL, CLIP)
TEXTUAL = ModelKey(Task.CLIP, Part.TEXTUAL, CLIP)
FACE = ModelKey(Task.FACES, Part.RECOGNITION, FACES)
DETECTOR = ModelKey(Task.FACES, Part.DETECTION, FACES)
READER = ModelKey(Task.OCR, Part.RECOGNITION, "PP-OCRv6_tiny")
NAME = f"clip/{CLIP}"


def add_gelu(path: Path, kind: str) -> None:
    """Put an activation on a tower's input, as two exporters would."""
    model = onnx.load(path)
    graph = model.graph
    name = graph.input[0].name
    is_bytes = graph.input[0].type.tensor_type.elem_type == TensorProto.UINT8
    nodes = [helper.make_node("Cast", [name], ["gelu_x"], to=TensorProto.FLOAT)]
    for node in graph.node:
        node.input[:] = ["gelu_out" if each == name else each for each in node.input]
    if kind == "quick":
        graph.initializer.append(numpy_helper.from_array(np.array(1.702, np.float32), "gelu_c"))
        nodes.append(helper.make_node("Mul", ["gelu_x", "gelu_c"], ["gelu_m"]))
        nodes.append(helper.make_node("Sigmoid", ["gelu_m"], ["gelu_s"]))
    else:
        nodes.append(helper.make_node("Erf", ["gelu_x"], ["gelu_s"]))
    nodes.append(helper.make_node("Mul", ["gelu_x", "gelu_s"], ["gelu_y"]))
    last = TensorProto.UINT8 if is_bytes else TensorProto.FLOAT
    nodes.append(helper.make_node("Cast", ["gelu_y"], ["gelu_out"], to=last))
    for position, node in enumerate(nodes):
        graph.node.insert(position, node)
    onnx.save(model, path)


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    """Revision main with erf GELU, v2 with quick GELU and another way of resizing."""
    folder = tmp_path / "models"
    make_models(folder)
    shutil.copytree(folder / "clip" / CLIP, tmp_path / "copy")
    shutil.move(tmp_path / "copy", folder / "clip" / CLIP / "v2")
    faces = folder / "facial-recognition" / FACES
    shutil.copytree(faces, tmp_path / "copy")
    shutil.move(tmp_path / "copy", faces / "v2")
    add_gelu(folder / "clip" / CLIP / "visual" / "model.onnx", "erf")
    add_gelu(folder / "clip" / CLIP / "v2" / "visual" / "model.onnx", "quick")
    return folder


class Start:
    """One start of the service: its settings, its store, its guard."""

    def __init__(self, shelf: Path, points: str = "immich", **changes: Any) -> None:
        options = {"models_dir": shelf, "state_dir": shelf.parent / "state", "offline": True}
        self.settings = Settings(**{**options, **changes})
        self.guard = IndexGuard(self.settings, points)
        self.store = ModelStore(self.settings)

    def load(self, *keys: ModelKey) -> list[ModelFiles]:
        return [self.guard.files(key, self.store.ensure) for key in keys]

    def finding(self, name: str = NAME) -> IndexFinding:
        return self.guard.finding(name)


def change(shelf: Path, key: str, value: Any, revision: str = "") -> None:
    path = shelf / "clip" / CLIP / revision / "visual" / "preprocess_cfg.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, key: value}))


def test_without_a_history_it_is_unknown_and_never_the_same(shelf: Path) -> None:
    start = Start(shelf)
    assert (start.finding().state, start.finding().served) == ("unknown", "as set")
    assert [one.state for one in start.guard.findings([NAME])] == ["unknown"]


def test_what_the_index_has_is_not_given_up_when_no_file_can_be_opened(shelf: Path) -> None:
    (before,) = Start(shelf).load(VISUAL)
    now = Start(shelf, model_revision="v2")
    with pytest.raises((OSError, Busy), match="Too many open files"), no_more_files():
        now.load(VISUAL)
    (after,) = now.load(VISUAL)
    assert (after.graph, now.finding().served) == (before.graph, "as before")


def test_the_same_again_is_quiet_and_says_since_when(
    shelf: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Start(shelf).load(VISUAL, TEXTUAL)
    again = Start(shelf)
    again.guard.tell("1")
    assert again.finding().state == "same"
    assert "before that is not known" in again.finding().text
    assert caplog.records == []


def test_another_revision_is_said_with_its_consequence_and_the_way_out(shelf: Path) -> None:
    Start(shelf).load(VISUAL, TEXTUAL)
    found = Start(shelf, model_revision="v2").finding()
    assert (found.state, found.served) == ("changed", "as before")
    assert found.text.startswith(
        f"vectors of {CLIP} were made with erf GELU (revision main); v2 uses QuickGELU: run Smart "
        "Search for all photos in Immich, or set ML_MODEL_REVISION=main"
    )
    assert f"immich-ml-metal models accept {CLIP}" in found.text


def test_until_it_is_accepted_the_former_files_are_served(shelf: Path) -> None:
    before = Start(shelf).load(VISUAL, TEXTUAL)
    other = Start(shelf, model_revision="v2")
    assert [f.graph for f in other.load(VISUAL, TEXTUAL)] == [f.graph for f in before]
    assert other.finding().state == "changed"
    other.guard.history.accept(NAME)
    assert "v2" in other.load(VISUAL)[0].graph.parts
    assert "v2" in other.load(TEXTUAL)[0].graph.parts
    assert Start(shelf, model_revision="v2").finding().state == "same"


def test_switching_back_is_quiet(shelf: Path, caplog: pytest.LogCaptureFixture) -> None:
    Start(shelf).load(VISUAL)
    Start(shelf, model_revision="v2").load(VISUAL)
    back = Start(shelf)
    back.guard.tell("3")
    assert (back.finding().state, caplog.records) == ("same", [])


def test_after_accepting_the_next_change_is_said_again(shelf: Path) -> None:
    Start(shelf).load(VISUAL)
    Start(shelf, model_revision="v2").guard.history.accept(NAME)
    Start(shelf, model_revision="v2").load(VISUAL)
    back = Start(shelf)
    assert "were made with QuickGELU (revision v2); main uses erf GELU" in back.finding().text
    assert "v2" in back.load(VISUAL)[0].graph.parts


def test_nothing_is_fetched_for_a_revision_that_waits_for_the_users_word(shelf: Path) -> None:
    Start(shelf).load(VISUAL, TEXTUAL)
    other = Start(shelf, model_revision="v9")
    assert "v9" not in other.load(VISUAL)[0].graph.parts
    assert "what v9 computes is not known until it is here" in other.finding().text
    other.guard.history.accept(NAME)
    with pytest.raises(ModelUnavailable):
        other.load(VISUAL)


def test_where_the_former_files_are_gone_it_says_so_and_serves_what_is_set(shelf: Path) -> None:
    Start(shelf).load(VISUAL)
    (shelf / "clip" / CLIP / "visual" / "model.onnx").unlink()
    other = Start(shelf, model_revision="v2")
    assert "v2" in other.load(VISUAL)[0].graph.parts
    assert (other.finding().state, other.finding().served) == ("changed", "as set")
    assert "is not at hand" in other.finding().text
    assert other.finding().state == "changed", "serving it does not make it the index's"


def test_a_file_replaced_under_the_same_revision_is_said(shelf: Path) -> None:
    Start(shelf).load(VISUAL)
    shutil.copy(
        shelf / "clip" / CLIP / "v2" / "visual" / "model.onnx",
        shelf / "clip" / CLIP / "visual" / "model.onnx",
    )
    found = Start(shelf).finding()
    assert (found.state, found.served) == ("changed", "as set")
    assert "put the former files back" in found.text


def test_another_resize_rule_is_said_and_the_former_one_kept(shelf: Path) -> None:
    change(shelf, "resize_mode", "squash")
    Start(shelf, immich_compat="3.2").load(VISUAL)
    other = Start(shelf)
    assert other.load(VISUAL)[0].compat == "3.2"
    assert "prepared as shortest bicubic" in other.finding().text
    assert "set ML_IMMICH_COMPAT=3.2" in other.finding().text
    assert Start(shelf, immich_compat="3.2").finding().state == "same"


def test_a_resize_rule_that_changes_nothing_for_a_model_is_quiet(shelf: Path) -> None:
    Start(shelf, immich_compat="3.2").load(VISUAL)
    assert Start(shelf).finding().state == "same"


def test_faces_aligned_by_another_detector_are_said(shelf: Path) -> None:
    name = f"facial-recognition/{FACES}"
    Start(shelf, points="vision").load(DETECTOR, FACE)
    other = Start(shelf, points="immich")
    found = other.finding(name)
    assert found.state == "changed"
    assert "aligned by Apple Vision's points; now it would be the points of Immich's" in found.text
    assert "Facial Recognition" in found.text
    assert "ML_FACE_DETECTION_ENGINE=vision" in found.text
    assert other.guard.held_points() == "vision"
    without = IndexGuard(other.settings, "immich", has_vision=False)
    assert (without.held_points(), without.finding(name).served) == ("", "as set")
    same = Start(shelf, points="vision")
    assert (same.finding(name).state, same.guard.held_points()) == ("same", "vision")
    same.guard.history.accept(name)
    assert same.guard.held_points() == ""


def test_text_is_not_guarded_because_nothing_compares_it(shelf: Path) -> None:
    Start(shelf).load(READER)
    assert Start(shelf).guard.findings() == []


def test_a_change_is_logged_once_in_each_start_whatever_the_number_of_workers(
    shelf: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Start(shelf).load(VISUAL)
    for start in ("gateway 1", "gateway 1", "gateway 2"):
        Start(shelf, model_revision="v2").guard.tell(start)
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    assert "QuickGELU" in caplog.text


@pytest.mark.parametrize("mode", ["warn", "off"])
def test_a_setting_lets_the_new_way_in(shelf: Path, mode: str) -> None:
    Start(shelf).load(VISUAL)
    other = Start(shelf, model_revision="v2", index_guard=mode)
    assert "v2" in other.load(VISUAL)[0].graph.parts
    assert bool(other.guard.findings()) == (mode == "warn")
    assert Start(shelf).finding().state == "same", "it is not the index's until it is accepted"


def test_guard_off_remembers_nothing(shelf: Path) -> None:
    Start(shelf, index_guard="off").load(VISUAL)
    assert not (shelf.parent / "state").exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": 1, "models": {"clip/x": 3}}'])
def test_a_damaged_memory_knows_nothing_and_stops_nothing(shelf: Path, content: str) -> None:
    state = shelf.parent / "state"
    state.mkdir()
    (state / "index.json").write_text(content)
    start = Start(shelf)
    assert start.load(VISUAL)[0].graph.exists()
    assert start.finding().state in ("unknown", "same")


def test_a_memory_that_cannot_be_written_stops_nothing(shelf: Path) -> None:
    (shelf.parent / "state").write_text("a file where the folder should be")
    start = Start(shelf)
    assert start.load(VISUAL)[0].graph.exists()
    assert start.finding().state == "unknown"


def embed(url: str) -> list[float]:
    answer = predict(url, VISUAL_ENTRY, image=draw_faces((160, 160)))
    assert answer.status_code == 200, answer.text
    return numbers(answer.json()["clip"])


def test_the_service_answers_the_indexs_vectors_until_accepted(shelf: Path) -> None:
    main, v2 = Start(shelf).settings, Start(shelf, model_revision="v2").settings
    with serve(build_app(main)) as url:
        before = embed(url)
    with serve(build_app(v2)) as url:
        assert embed(url) == before
    IndexGuard(v2).history.accept(NAME)
    with serve(build_app(v2)) as url:
        assert embed(url) != before
    with serve(build_app(main)) as url:
        assert embed(url) != before


# -- where it speaks -------------------------------------------------------------------------------


def command(shelf: Path, *words: str, revision: str = "v2") -> str:
    """What a command prints, both streams, with the settings of a start."""
    environment = {
        "ML_MODELS_DIR": str(shelf),
        "ML_STATE_DIR": str(shelf.parent / "state"),
        "ML_MODEL_REVISION": revision,
        "ML_OFFLINE": "1",
        "ML_PORT": "1",  # nobody is there
        "COLUMNS": "400",
    }
    done = subprocess.run(
        [sys.executable, "-m", "immich_ml_metal", *words],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    return done.stdout + done.stderr


SAID = "were made with erf GELU (revision main); v2 uses QuickGELU"


def test_the_guard_speaks_at_all_five_places_and_is_quiet_when_switched_back(
    shelf: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Start(shelf).load(VISUAL, TEXTUAL)
    photo = shelf.parent / "photo.png"
    photo.write_bytes(draw_faces((160, 160)))
    questions = (
        ("models", "info", CLIP),
        ("doctor",),
        ("parity", "--against", "http://127.0.0.1:1", str(photo)),
    )
    for revision, is_said in (("v2", True), ("main", False)):
        caplog.clear()
        with serve(build_app(Start(shelf, model_revision=revision).settings)) as url:
            wait_for_look(url)
            states = {
                row["model"]: row["state"] for row in httpx.get(f"{url}/health").json()["index"]
            }
        assert (SAID in caplog.text) is is_said
        assert states[NAME] == ("changed" if is_said else "same")
        for words in questions:
            assert (SAID in command(shelf, *words, revision=revision)) is is_said, words


def wait_for_look(url: str) -> None:
    end_s = time.monotonic() + 10
    while not httpx.get(f"{url}/health").json()["index"]:
        assert time.monotonic() < end_s, "the guard never looked"
        time.sleep(0.02)


def test_models_accept_lets_the_next_start_serve_what_is_set(shelf: Path) -> None:
    Start(shelf).load(VISUAL)
    said = command(shelf, "models", "accept", CLIP)
    assert "run Smart Search for all photos in Immich" in said
    assert "v2" in Start(shelf, model_revision="v2").load(VISUAL)[0].graph.parts


def test_a_clock_that_is_set_back_does_not_undo_what_was_accepted(
    shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "time", lambda: 2e9)
    Start(shelf).load(VISUAL)
    monkeypatch.setattr(time, "time", lambda: 1e9)
    start = Start(shelf, model_revision="v2")
    assert start.finding().served == "as before"
    start.guard.history.accept(NAME)
    [files] = start.load(VISUAL)
    assert files.graph == shelf / "clip" / CLIP / "v2" / "visual" / "model.onnx"
    assert Start(shelf, model_revision="v2").finding().state == "same"
    assert Start(shelf).finding().served == "as before"  # the next change waits for a word again


def test_a_text_model_has_nothing_to_accept(shelf: Path) -> None:
    assert "makes no vectors" in command(shelf, "models", "accept", "PP-OCRv6_tiny")


def test_commands_read_the_memory_and_write_nothing_into_it(shelf: Path) -> None:
    Start(shelf).load(VISUAL)
    before = (shelf.parent / "state" / "index.json").read_bytes()
    command(shelf, "models", "info", CLIP)
    command(shelf, "demo", revision="v2")  # starts a service of its own
    assert (shelf.parent / "state" / "index.json").read_bytes() == before


def test_one_reason_why_nothing_is_remembered_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_bytes(b"")
    history = History(StateFolder(tmp_path / "file"))
    assert [history.recall("clip/a"), history.recall("clip/b")] == [None, None]
    assert [record.getMessage() for record in caplog.records] == [
        f"what made the index is not known: cannot read {tmp_path}/file/index.json: Not a directory"
    ]
