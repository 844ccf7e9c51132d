import json
import logging
import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from doubles.tiny_models import FLOAT, Net

from immich_ml_metal.backends.ort.engine import OrtGraph, session_options
from immich_ml_metal.backends.ort.prepared import FOLDER, MIN_BYTES, prepared_graph
from immich_ml_metal.models.weights import weight_files

SIDE = 3072  # a square of float32 that is just over the limit


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose weights are worth preparing, and its prepared form."""
    folder = tmp_path_factory.mktemp("large")
    net = Net()
    weights = np.random.default_rng(0).normal(size=(SIDE, SIDE)).astype(np.float32)
    net.add("MatMul", "x", net.const(weights), name="y")
    net.save(folder / "model.onnx", ("x", FLOAT, ["n", SIDE]), [("y", FLOAT, ["n", SIDE])])
    assert (folder / "model.onnx").stat().st_size >= MIN_BYTES
    prepared_graph(folder / "model.onnx")
    return folder


@pytest.fixture
def copy(large: Path, tmp_path: Path) -> Path:
    """The model and its prepared form, to be spoilt; the clock of its files as it was."""
    shutil.copytree(large, tmp_path / "m", copy_function=shutil.copy2)
    return tmp_path / "m" / "model.onnx"


def forms(path: Path) -> list[Path]:
    return sorted((path.parent / FOLDER).iterdir()) if (path.parent / FOLDER).exists() else []


def test_the_prepared_form_gives_the_same_numbers(large: Path) -> None:
    original = large / "model.onnx"
    prepared = prepared_graph(original)
    assert prepared != original
    x = np.random.default_rng(1).normal(size=(2, SIDE)).astype(np.float32)
    one, two = (
        OrtGraph(path, options=session_options(1)).run({"x": x})[0] for path in (original, prepared)
    )
    np.testing.assert_allclose(one, two, rtol=1e-6, atol=1e-6)
    assert OrtGraph(prepared, options=session_options(1)).size_bytes > MIN_BYTES


def test_its_size_is_that_of_the_weights_not_of_both_forms(large: Path) -> None:
    original = large / "model.onnx"
    graph = OrtGraph(prepared_graph(original), options=session_options(1), weights=original)
    assert graph.size_bytes == original.stat().st_size


def test_it_is_made_once(large: Path) -> None:
    before = [(p, p.stat().st_mtime_ns) for p in forms(large / "model.onnx")]
    assert len(before) == 1
    prepared_graph(large / "model.onnx")
    assert [(p, p.stat().st_mtime_ns) for p in forms(large / "model.onnx")] == before


def test_the_weights_themselves_are_never_changed(large: Path) -> None:
    assert weight_files(large / "model.onnx") == [large / "model.onnx"]
    onnx.checker.check_model(onnx.load(large / "model.onnx"))
    assert "sha256" in json.loads((forms(large / "model.onnx")[0] / "manifest.json").read_text())


def test_a_small_model_is_loaded_as_it_is(models: Path) -> None:
    path = models / "clip/ViT-B-32__openai/visual/model.onnx"
    assert prepared_graph(path) == path
    assert not (path.parent / FOLDER).exists()


def damage_weights(form: Path) -> None:
    with (form / "model.data").open("r+b") as file:
        file.truncate(1000)


def damage_manifest(form: Path) -> None:
    (form / "manifest.json").write_text("{")


def forget_manifest(form: Path) -> None:
    (form / "manifest.json").write_text("[]")


@pytest.mark.parametrize("spoil", [damage_weights, damage_manifest, forget_manifest])
def test_a_form_that_is_not_whole_is_made_again(copy: Path, spoil: object) -> None:
    (form,) = forms(copy)
    assert callable(spoil)
    spoil(form)
    assert prepared_graph(copy) == form / "model.onnx"
    assert (form / "model.data").stat().st_size > MIN_BYTES


def test_new_weights_get_a_new_form_and_the_old_one_goes(copy: Path) -> None:
    (old,) = forms(copy)
    model = onnx.load(copy)
    model.doc_string = "other"
    onnx.save(model, copy)
    prepared = prepared_graph(copy)
    assert prepared.parent != old
    assert forms(copy) == [prepared.parent]


def test_what_a_killed_process_left_is_removed_and_a_running_one_is_left_alone(copy: Path) -> None:
    (form,) = forms(copy)
    shutil.rmtree(form)
    left, running = (copy.parent / FOLDER / name for name in (".staging-a", ".staging-b"))
    left.mkdir()
    running.mkdir()
    os.utime(left, (1, 1))
    prepared_graph(copy)
    assert forms(copy) == [running, form]


def test_where_preparing_is_not_possible_the_file_is_loaded_as_it_is_and_told(
    copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.rmtree(copy.parent / FOLDER)
    (copy.parent / FOLDER).write_text("a file in the way")
    with caplog.at_level(logging.WARNING):
        assert prepared_graph(copy) == copy
    (record,) = caplog.records
    assert "weights not prepared" in record.getMessage()


def test_a_file_that_the_runtime_rejects_is_told_in_its_words(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(bytes(MIN_BYTES))
    with caplog.at_level(logging.WARNING):
        assert prepared_graph(path) == path
    assert "onnxruntime" in caplog.records[0].getMessage()
    assert forms(path) == []
