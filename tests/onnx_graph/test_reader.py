"""Reading ONNX files: weights beside the file, old and new forms of constants, damage."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from doubles.onnx_models import (
    FLOAT,
    assert_close,
    make_model,
    node,
    randn,
    run_ort,
    run_ours,
    save,
    value,
)
from onnx import TensorProto, helper, numpy_helper

from immich_ml_metal.errors import LoadFailed
from immich_ml_metal.onnx_graph.reader import read

X = value("x", FLOAT, [None, 4])
W = randn(4, 3)


def linear_model() -> onnx.ModelProto:
    return make_model([node("MatMul", "x w", "y")], [X], [value("y", FLOAT, [None, 3])], {"w": W})


def test_weights_beside_the_file_are_mapped_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(linear_model(), path, save_as_external_data=True, location="w.bin", size_threshold=0)
    program = read(path)
    assert isinstance(program.constants["w"].base, np.memmap)
    assert np.array_equal(program.constants["w"], W)


def test_a_missing_weight_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(linear_model(), path, save_as_external_data=True, location="w.bin", size_threshold=0)
    (tmp_path / "w.bin").unlink()
    with pytest.raises(LoadFailed, match=r"cannot read the weights 'w' in .*w\.bin"):
        read(path)


@pytest.mark.parametrize("location", ["../w.bin", "/etc/passwd", "a/../../w.bin"])
def test_weights_outside_the_folder_are_refused(location: str, tmp_path: Path) -> None:
    model = linear_model()
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    with pytest.raises(LoadFailed, match="outside the model's folder"):
        read(save(model, tmp_path))


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x08\x09"])
def test_what_is_not_a_model_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(LoadFailed, match=r"model\.onnx"):
        read(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LoadFailed, match="cannot read"):
        read(tmp_path / "none.onnx")


@pytest.mark.parametrize("opset", [8, 99])
def test_an_unknown_opset_is_refused_with_the_known_ones(opset: int, tmp_path: Path) -> None:
    model = linear_model()
    model.opset_import[0].version = opset
    with pytest.raises(LoadFailed, match=f"opset {opset}, known are 9 to 24"):
        read(save(model, tmp_path))


@pytest.mark.parametrize(
    ("attribute", "given", "expected"),
    [
        ("value_float", 2.5, np.float32(2.5)),
        ("value_floats", [1.0, 2.0], np.array([1, 2], np.float32)),
        ("value_int", 3, np.int64(3)),
        ("value_ints", [1, 2], np.array([1, 2], np.int64)),
        ("value", numpy_helper.from_array(W), W),
    ],
)
def test_every_way_to_write_a_constant_is_read(
    attribute: str, given: Any, expected: Any, tmp_path: Path
) -> None:
    nodes = [helper.make_node("Constant", [], ["c"], **{attribute: given}), node("Neg", "x", "y")]
    found = read(save(make_model(nodes, [X], ["y"]), tmp_path)).constants["c"]
    assert found.dtype == np.asarray(expected).dtype
    assert np.array_equal(found, expected)


def test_functions_of_the_file_are_inlined(tmp_path: Path) -> None:
    double = helper.make_function(
        "here", "Double", ["a"], ["b"], [node("Add", "a a", "b")], [helper.make_opsetid("", 19)]
    )
    model = make_model([helper.make_node("Double", ["x"], ["y"], domain="here")], [X], ["y"])
    model.functions.append(double)
    model.opset_import.append(helper.make_opsetid("here", 1))
    path = save(model, tmp_path)
    assert [n.op for n in read(path).nodes] == ["Add"]
    assert_close(run_ours(path, {"x": randn(2, 4)}), run_ort(model, {"x": randn(2, 4)}))


def test_an_operator_of_another_domain_keeps_its_domain_in_its_name(tmp_path: Path) -> None:
    model = make_model([helper.make_node("Gelu", ["x"], ["y"], domain="com.microsoft")], [X], ["y"])
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    assert [n.op for n in read(save(model, tmp_path)).nodes] == ["com.microsoft.Gelu"]


def test_half_precision_tables_stay_as_small_as_they_are(tmp_path: Path) -> None:
    nodes = [node("Gather", "table i", "g"), node("Cast", "g", "y", to=1)]
    table = randn(9, 4).astype(np.float16)
    i = value("i", TensorProto.INT32, [None])
    path = save(make_model(nodes, [i], [value("y", FLOAT, [None, 4])], {"table": table}), tmp_path)
    feeds = {"i": np.array([3, 1], np.int32)}
    assert read(path).constants["table"].dtype == np.float16
    assert_close(run_ours(path, feeds), run_ort(path, feeds))
