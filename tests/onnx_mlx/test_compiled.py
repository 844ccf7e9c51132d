"""A compiled model as the service uses it: rows, shapes, number formats, memory, refusals."""

import gc
from pathlib import Path
from unittest.mock import Mock

import mlx.core as mx
import numpy as np
import onnx
import pytest
from doubles.onnx_models import (
    FLOAT,
    INT64,
    UINT8,
    Array,
    assert_close,
    ints,
    make_model,
    node,
    randn,
    run_ort,
    save,
    value,
)

from immich_ml_metal.errors import InferenceError, LoadFailed
from immich_ml_metal.onnx_mlx.compiled import SHAPES, MlxGraph, Options
from immich_ml_metal.onnx_mlx.formats import NumberFormat

PLAIN = Options(max_batch=8, compiled=False)


def embedder(*, batch: int | None = 1) -> onnx.ModelProto:
    """Picture → unit vector, as Immich's exports end."""
    nodes = [
        node("Conv", "image w", "c", strides=[4, 4]),
        node("Reshape", "c flat", "f"),
        node("MatMul", "f fc", "v"),
        node("Relu", "v", "r"),
        node("ReduceL2", "r", "n", axes=[-1]),
        node("Clip", "n eps", "m"),
        node("Div", "r m", "embedding"),
    ]
    constants = {
        "w": randn(8, 3, 4, 4),
        "fc": randn(32, 16, seed=1),
        "flat": ints(1 if batch else 0, 32) if batch else ints(-1, 32),
        "eps": np.array(1e-12, np.float32),
    }
    image, out = value("image", FLOAT, [batch, 3, 8, 8]), value("embedding", FLOAT, [batch, 16])
    return make_model(nodes, [image], [out], constants, 17)


IMAGES = randn(8, 3, 8, 8, seed=3)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return save(embedder(), tmp_path)


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_rows_together_are_what_they_are_alone(path: Path, rows: int) -> None:
    graph = MlxGraph(path, PLAIN)
    alone = [graph.run({"image": IMAGES[i : i + 1]})[0] for i in range(rows)]
    (together,) = graph.run({"image": IMAGES[:rows]})
    assert_close([together], [np.concatenate(alone)])


def test_rows_are_padded_to_powers_of_two_so_that_shapes_repeat(path: Path) -> None:
    graph = MlxGraph(path, PLAIN)
    for rows in range(1, 9):
        assert graph.run({"image": IMAGES[:rows]})[0].shape == (rows, 16)
    assert graph.shapes == 4  # 1, 2, 4, 8


def test_a_compiled_function_gives_what_onnx_runtime_gives(path: Path) -> None:
    graph = MlxGraph(path, Options(max_batch=4))
    expected = [run_ort(path, {"image": IMAGES[i : i + 1]})[0] for i in range(3)]
    assert_close(graph.run({"image": IMAGES[:3]}), [np.concatenate(expected)])


def test_the_least_recently_used_shape_is_dropped_when_there_are_too_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(
        [node("Neg", "x", "y")], [value("x", FLOAT, [1, None])], [value("y", FLOAT, [1, None])]
    )
    graph = MlxGraph(save(model, tmp_path), Options())
    compiled = Mock(wraps=mx.compile)
    monkeypatch.setattr(mx, "compile", compiled)
    for length in [*range(1, SHAPES + 1), 1, SHAPES + 1]:  # 1 was used again: 2 is dropped
        graph.run({"x": randn(1, length)})
    assert (graph.shapes, compiled.call_count) == (SHAPES, SHAPES + 1)
    graph.run({"x": randn(1, 1)})
    assert compiled.call_count == SHAPES + 1
    graph.run({"x": randn(1, 2)})
    assert compiled.call_count == SHAPES + 2


def test_a_graph_says_what_it_takes_and_gives(path: Path) -> None:
    graph = MlxGraph(path, PLAIN)
    assert [(s.name, s.shape) for s in graph.inputs] == [("image", (None, 3, 8, 8))]
    assert [(s.name, s.shape) for s in graph.outputs] == [("embedding", (None, 16))]
    assert (graph.max_batch, graph.fixed_shapes) == (8, True)
    assert graph.size_bytes == 4 * (8 * 3 * 16 + 32 * 16)


def test_a_graph_whose_rows_are_tied_takes_one(tmp_path: Path) -> None:
    nodes = [node("Softmax", "x", "y", axis=0)]
    model = make_model(nodes, [value("x", FLOAT, [1, 4])], [value("y", FLOAT, [1, 4])])
    assert MlxGraph(save(model, tmp_path), PLAIN).max_batch == 1


@pytest.mark.parametrize(
    ("number_format", "cosine"), [("float16", 0.999999), ("mixed", 0.999999), ("bfloat16", 0.9999)]
)
def test_narrow_weights_give_nearly_the_same_vector(
    path: Path, number_format: str, cosine: float
) -> None:
    narrow = MlxGraph(path, Options(number_format=NumberFormat(number_format), compiled=False))
    (ours,) = narrow.run({"image": IMAGES[:1]})
    (theirs,) = run_ort(path, {"image": IMAGES[:1]})
    assert ours.dtype == np.float32
    assert float((ours * theirs).sum()) > cosine
    assert abs(float(np.linalg.norm(ours)) - 1) < 1e-5  # the length is taken in float32
    assert narrow.size_bytes < 0.6 * MlxGraph(path, PLAIN).size_bytes


def test_sums_do_not_lose_digits_in_half_precision(tmp_path: Path) -> None:
    model = make_model(
        [node("ReduceMean", "x", "y", axes=[1])],
        [value("x", FLOAT, [1, 60000])],
        [value("y", FLOAT, [1, 1])],
        opset=17,
    )
    graph = MlxGraph(
        save(model, tmp_path), Options(number_format=NumberFormat.FLOAT16, compiled=False)
    )
    (mean,) = graph.run({"x": np.full((1, 60000), 2.0, np.float32)})
    assert mean.item() == 2.0  # the sum, 120000, has no place in float16


def test_a_mask_of_the_lowest_number_stays_finite_in_half_precision(tmp_path: Path) -> None:
    lowest = np.array([[0, np.finfo(np.float32).min]], np.float32)
    nodes = [node("Add", "x mask", "m"), node("Softmax", "m", "y", axis=-1)]
    x, y = value("x", FLOAT, [None, 2]), value("y", FLOAT, [None, 2])
    path = save(make_model(nodes, [x], [y], {"mask": lowest}), tmp_path)
    graph = MlxGraph(path, Options(number_format=NumberFormat.FLOAT16, compiled=False))
    assert graph.run({"x": np.zeros((1, 2), np.float32)})[0].tolist() == [[1, 0]]


def test_bytes_in_and_whole_numbers_out_keep_their_types(tmp_path: Path) -> None:
    nodes = [node("Cast", "x", "f", to=1), node("ArgMax", "f", "y", axis=-1, keepdims=0)]
    model = make_model(nodes, [value("x", UINT8, [None, 5])], [value("y", INT64, [None])])
    graph = MlxGraph(save(model, tmp_path), PLAIN)
    (best,) = graph.run({"x": np.array([[1, 200, 3, 0, 9]], np.uint8)})
    assert (best.dtype, best.tolist()) == (np.dtype(np.int64), [1])


def test_large_whole_numbers_saturate_instead_of_wrapping(tmp_path: Path) -> None:
    model = make_model(
        [node("Neg", "x", "y")], [value("x", INT64, [None])], [value("y", INT64, [None])]
    )
    graph = MlxGraph(save(model, tmp_path), PLAIN)
    (result,) = graph.run({"x": ints(5, 2**40)})
    assert result.tolist() == [-5, -(2**31 - 1)]


def test_closing_frees_the_weights(path: Path) -> None:
    gc.collect()  # graphs of other tests, never closed
    before = mx.get_active_memory()
    graph = MlxGraph(path, PLAIN)
    graph.run({"image": IMAGES[:2]})
    assert mx.get_active_memory() >= before + graph.size_bytes
    graph.close()
    assert mx.get_active_memory() <= before
    assert mx.get_cache_memory() == 0
    with pytest.raises(InferenceError, match="closed"):
        graph.run({"image": IMAGES[:1]})


def test_a_missing_input_is_named(path: Path) -> None:
    with pytest.raises(InferenceError, match="input 'image' is missing, given are \\['img'\\]"):
        MlxGraph(path, PLAIN).run({"img": IMAGES[:1]})


def test_an_unknown_operator_is_refused_at_load_by_name_node_and_model(tmp_path: Path) -> None:
    model = make_model([node("Det", "x", "y")], [value("x", FLOAT, [2, 2])], ["y"])
    with pytest.raises(LoadFailed, match=r"odd\.onnx: .* run Det 'Det:y': the operator Det has no"):
        MlxGraph(save(model, tmp_path, "odd.onnx"), PLAIN)


def refuse(model: onnx.ModelProto, folder: Path) -> str:
    with pytest.raises(LoadFailed) as caught:
        MlxGraph(save(model, folder), PLAIN)
    return str(caught.value)


def test_an_unknown_form_of_an_operator_is_refused_at_load(tmp_path: Path) -> None:
    nodes = [node("MaxPool", "x", "y places", kernel_shape=[2, 2])]
    x = value("x", FLOAT, [None, 3, None, None])
    message = refuse(make_model(nodes, [x], ["y", "places"]), tmp_path)
    assert "cannot run MaxPool 'MaxPool:y places': MaxPool that gives positions" in message
    assert "the cpu engine can" in message


def test_a_shape_that_depends_on_the_data_is_refused_at_load(tmp_path: Path) -> None:
    model = make_model(
        [node("NonZero", "x", "y")], [value("x", FLOAT, [4])], [value("y", INT64, None)]
    )
    assert "depends on the data" in refuse(model, tmp_path)


def test_reshaping_to_a_shape_from_the_data_is_refused_at_load(tmp_path: Path) -> None:
    inputs = [value("x", FLOAT, [4]), value("s", INT64, [1])]
    model = make_model([node("Reshape", "x s", "y")], inputs, ["y"])
    assert "input 1 is not known before the network runs" in refuse(model, tmp_path)


def test_results_are_numpy_arrays_of_their_own(path: Path) -> None:
    graph = MlxGraph(path, PLAIN)
    (first,) = graph.run({"image": IMAGES[:1]})
    kept: Array = first.copy()
    graph.run({"image": IMAGES[1:2]})
    graph.close()
    assert np.array_equal(first, kept)
