"""Large weights prepared for the CPU: used where they fit, made anew where anything does not."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from doubles.tiny_models import FLOAT, Net

from immich_ml_metal.backends.ort import prepared
from immich_ml_metal.backends.ort.engine import OrtEngine
from immich_ml_metal.backends.ort.prepared import (
    FOLDER,
    GRAPH,
    MIN_BYTES,
    WEIGHTS,
    prepare_in_child,
    prepared_form,
    worth_preparing,
)
from immich_ml_metal.backends.ort.session import OrtGraph, session_options
from immich_ml_metal.errors import LoadFailed
from immich_ml_metal.onnx_graph.rewriting import REWRITINGS
from immich_ml_metal.settings import Settings
from immich_ml_metal.types import ModelFiles, ModelKey, Part, Task

ALL = tuple(REWRITINGS)
SIDE = 112
FEATURES = 3 * SIDE * SIDE // 2  # times 512 outputs: just over the limit
KEY = ModelKey(Task.FACES, Part.RECOGNITION, "buffalo_l")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recogniser whose weights are worth preparing, and its prepared form."""
    path = tmp_path_factory.mktemp("large") / "model.onnx"
    net = Net()
    weights = np.random.default_rng(0).normal(size=(FEATURES, 512)).astype(np.float32)
    half = net.add("MaxPool", "x", kernel_shape=[2, 1], strides=[2, 1])
    net.add("MatMul", net.add("Flatten", half), net.const(weights), name="y")
    net.save(path, ("x", FLOAT, ["n", 3, SIDE, SIDE]), [("y", FLOAT, ["n", 512])])
    assert worth_preparing(path)
    prepare_in_child(prepared_form(path, ALL), ALL)
    return path


@pytest.fixture
def copy(large: Path, tmp_path: Path) -> Path:
    """The model and its prepared form, to be spoilt; the clock of its files as it was."""
    shutil.copytree(large.parent, tmp_path / "m", copy_function=shutil.copy2)
    return tmp_path / "m" / "model.onnx"


def forms(path: Path) -> list[Path]:
    return sorted((path.parent / FOLDER).iterdir()) if (path.parent / FOLDER).is_dir() else []


def load(path: Path) -> np.ndarray[Any, Any]:
    """The engine's answer to one face from this file."""
    engine = OrtEngine(Settings(intra_op_threads=1))
    try:
        model = engine.load(KEY, ModelFiles(path, path.parent, path.parent))
        face = np.random.default_rng(1).normal(size=(3, SIDE, SIDE)).astype(np.float32)
        (vector,) = model.infer([face])
        model.close()
        return np.asarray(vector)
    finally:
        engine.device.close()


def plain(path: Path) -> np.ndarray[Any, Any]:
    face = np.random.default_rng(1).normal(size=(1, 3, SIDE, SIDE)).astype(np.float32)
    (vectors,) = OrtGraph(path, options=session_options(1)).run({"x": face})
    return np.asarray(vectors[0])


def test_the_prepared_form_gives_the_same_numbers(large: Path) -> None:
    form = prepared_form(large, ALL).find()
    assert form is not None
    np.testing.assert_allclose(plain(form / GRAPH), plain(large), rtol=1e-5, atol=1e-4)


def test_its_size_is_that_of_the_weights_not_of_both_forms(large: Path) -> None:
    form = prepared_form(large, ALL).find()
    assert form is not None
    graph = OrtGraph(form / GRAPH, options=session_options(1), weights=large)
    assert graph.size_bytes == large.stat().st_size


def test_it_is_made_once_and_the_weights_are_never_changed(large: Path) -> None:
    before = [(p, p.stat().st_mtime_ns) for p in (large, *forms(large))]
    assert len(before) == 2
    load(large)
    assert [(p, p.stat().st_mtime_ns) for p in (large, *forms(large))] == before
    onnx.checker.check_model(onnx.load(large))


def test_a_small_model_is_loaded_as_it_is(models: Path) -> None:
    path = models / "clip/ViT-B-32__openai/visual/model.onnx"
    assert not worth_preparing(path)
    engine = OrtEngine(Settings())
    files = ModelFiles(path, path.parent, path.parents[1])
    engine.load(ModelKey(Task.CLIP, Part.VISUAL, "ViT-B-32__openai"), files).close()
    engine.device.close()
    assert not (path.parent / FOLDER).exists()


def damage_weights(form: Path) -> None:
    with (form / WEIGHTS).open("r+b") as file:
        file.truncate(1000)


def damage_graph(form: Path) -> None:
    (form / GRAPH).write_bytes(bytes((form / GRAPH).stat().st_size))


@pytest.mark.parametrize("spoil", [damage_weights, damage_graph])
def test_a_form_that_cannot_be_opened_costs_no_answer_and_is_made_again(
    copy: Path, spoil: Callable[[Path], None]
) -> None:
    (form,) = forms(copy)
    spoil(form)
    np.testing.assert_allclose(load(copy), load(copy), rtol=1e-5)
    assert (form / WEIGHTS).stat().st_size > MIN_BYTES
    assert plain(form / GRAPH).shape == (512,)


@pytest.mark.parametrize("changed", ["runtime", "options", "weights"])
def test_what_another_runtime_or_other_weights_made_is_replaced(
    copy: Path, changed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (old,) = forms(copy)
    if changed == "weights":
        model = onnx.load(copy)
        model.doc_string = "other"
        onnx.save(model, copy)
    elif changed == "runtime":
        monkeypatch.setattr("onnxruntime.__version__", "99.0")
    else:
        monkeypatch.setattr(prepared, "disabled_optimizers", lambda: ["AnotherFusion"])
    assert prepared_form(copy, ALL).find() is None
    load(copy)
    (new,) = forms(copy)
    assert new != old
    assert prepared_form(copy, ALL).find() == new


def test_the_form_of_another_processor_on_the_same_folder_stays(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (old,) = forms(copy)
    monkeypatch.setattr(prepared, "_processor", lambda: "0badcafe")
    load(copy)
    assert len(forms(copy)) == 2
    assert old in forms(copy)


def test_where_preparing_is_not_possible_the_file_is_loaded_as_it_is_and_told(
    copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.rmtree(copy.parent / FOLDER)
    (copy.parent / FOLDER).write_text("a file in the way")
    with caplog.at_level(logging.WARNING):
        assert load(copy).shape == (512,)
    (record,) = caplog.records
    assert "weights not prepared" in record.getMessage()


def test_a_runtime_that_fails_to_prepare_is_told_in_its_words(
    copy: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(copy.parent / FOLDER)
    monkeypatch.setattr("sys.executable", shutil.which("false"))
    with caplog.at_level(logging.WARNING):
        assert load(copy).shape == (512,)
    assert "returned non-zero exit status 1" in caplog.records[0].getMessage()
    assert forms(copy) == []


@pytest.mark.parametrize("content", [bytes(MIN_BYTES), b""])
def test_a_torn_file_fails_the_load(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(LoadFailed, match="ONNX Runtime rejects"):
        load(path)
    assert forms(path) == []
