"""The prepared weights on disk: used when they fit, ignored and replaced when anything does not."""

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from doubles.onnx_models import FLOAT, assert_close, ints, make_model, node, randn, save, value

from immich_ml_metal.onnx_mlx import prepared as prepared_module
from immich_ml_metal.onnx_mlx.compiled import MlxGraph, Options
from immich_ml_metal.onnx_mlx.formats import NumberFormat
from immich_ml_metal.onnx_mlx.prepared import FILE, Prepared

OPTIONS = Options(max_batch=4, compiled=False, prepared=True)
X = randn(2, 6)


def model(seed: int = 0) -> onnx.ModelProto:
    nodes = [
        node("Reshape", "x s", "r"),
        node("MatMul", "r w", "m"),
        node("Clip", "m low", "c"),
        node("Add", "c b", "y"),
    ]
    constants = {
        "w": randn(6, 5, seed=seed),
        "b": randn(5, seed=1),
        "s": ints(1, 6),
        "low": np.array(-0.5, np.float32),
    }
    proto = make_model(nodes, [value("x", FLOAT, [1, 6])], [value("y", FLOAT, [1, 5])], constants)
    entry = proto.metadata_props.add()
    entry.key, entry.value = "character", "a\nb"
    return proto


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return save(model(), tmp_path)


def forms(path: Path) -> list[Path]:
    return sorted((path.parent / "mlx").iterdir())


def is_used(path: Path, number_format: NumberFormat = NumberFormat.FLOAT32) -> bool:
    return Prepared(path, number_format).load() is not None


def test_the_second_load_needs_nothing_from_the_model_but_its_digest(path: Path) -> None:
    first = MlxGraph(path, OPTIONS)
    assert is_used(path)
    second = MlxGraph(path, OPTIONS)
    assert np.array_equal(first.run({"x": X})[0], second.run({"x": X})[0])
    assert (second.max_batch, second.size_bytes) == (4, first.size_bytes)
    assert (second.inputs, second.outputs) == (first.inputs, first.outputs)
    assert second.metadata == {"character": "a\nb"}


def test_other_weights_are_not_answered_with_the_old_ones(path: Path) -> None:
    MlxGraph(path, OPTIONS)
    save(model(seed=9), path.parent)
    assert not is_used(path)
    fresh, plain = MlxGraph(path, OPTIONS), MlxGraph(path, Options(compiled=False))
    assert_close(fresh.run({"x": X[:1]}), plain.run({"x": X[:1]}))
    assert is_used(path)


def test_each_number_format_has_its_own_file(path: Path) -> None:
    MlxGraph(path, OPTIONS)
    assert not is_used(path, NumberFormat.FLOAT16)
    MlxGraph(path, Options(number_format=NumberFormat.FLOAT16, compiled=False, prepared=True))
    assert sorted(form.name.rpartition("-")[2] for form in forms(path)) == ["float16", "float32"]


@pytest.mark.parametrize("keep", [0, 4, 60, -1, -40])
def test_a_truncated_file_is_ignored_and_replaced(path: Path, keep: int) -> None:
    expected = MlxGraph(path, OPTIONS).run({"x": X})
    prepared = forms(path)[0] / FILE
    prepared.write_bytes(prepared.read_bytes()[:keep])
    assert not is_used(path)
    assert_close(MlxGraph(path, OPTIONS).run({"x": X}), expected, 0)
    assert is_used(path)


def test_a_file_of_the_right_size_with_other_content_is_thrown_away(path: Path) -> None:
    expected = MlxGraph(path, OPTIONS).run({"x": X})
    prepared = forms(path)[0] / FILE
    prepared.write_bytes(bytes(prepared.stat().st_size))
    assert not is_used(path)
    assert forms(path) == []
    assert_close(MlxGraph(path, OPTIONS).run({"x": X}), expected, 0)
    assert is_used(path)


@pytest.mark.parametrize("changed", ["compiler_digest", "mlx", "onnx"])
def test_what_another_compiler_or_library_made_is_replaced(
    path: Path, changed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    MlxGraph(path, OPTIONS)
    old = forms(path)
    if changed == "compiler_digest":
        monkeypatch.setattr(prepared_module, "compiler_digest", lambda: "another")
    elif changed == "mlx":
        monkeypatch.setattr("importlib.metadata.version", lambda name: "99.0")
    else:
        monkeypatch.setattr("onnx.__version__", "99.0")
    assert not is_used(path)
    MlxGraph(path, OPTIONS)
    assert is_used(path)
    assert len(forms(path)) == 1
    assert forms(path) != old


def test_changed_external_weights_are_noticed(tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    onnx.save(model(), file, save_as_external_data=True, location="w.bin", size_threshold=0)
    MlxGraph(file, OPTIONS)
    assert is_used(file)
    weights = tmp_path / "w.bin"
    weights.write_bytes(weights.read_bytes()[::-1])
    assert not is_used(file)


def test_nothing_is_left_behind_but_the_file(path: Path) -> None:
    MlxGraph(path, OPTIONS)
    MlxGraph(path, OPTIONS)
    (form,) = forms(path)
    assert sorted(file.name for file in form.iterdir()) == ["manifest.json", FILE]


def test_a_folder_that_cannot_be_written_does_not_stop_the_load(path: Path) -> None:
    (path.parent / "mlx").write_text("in the way")
    graph = MlxGraph(path, OPTIONS)
    assert graph.run({"x": X})[0].shape == (2, 5)
    assert (path.parent / "mlx").read_text() == "in the way"


def test_without_the_option_nothing_is_written(path: Path) -> None:
    MlxGraph(path, Options(compiled=False))
    assert os.listdir(path.parent) == ["model.onnx"]  # noqa: PTH208 - names are all that matters
