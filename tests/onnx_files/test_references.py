from pathlib import Path

import pytest
from doubles.hub import external_onnx, onnx_bytes
from hypothesis import given
from hypothesis import strategies as st

from immich_ml_metal.onnx_files.protobuf import NotOnnx
from immich_ml_metal.onnx_files.references import (
    ExternalFile,
    external_files,
    weight_bytes,
    weight_files,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("onnx")


def test_a_model_with_its_weights_inside_needs_no_side_file(folder: Path) -> None:
    path = folder / "whole.onnx"
    path.write_bytes(onnx_bytes())
    assert external_files(path) == ()


def test_side_files_are_found_with_the_bytes_they_must_have(folder: Path) -> None:
    files = external_onnx(folder, 40_000)
    assert external_files(folder / "model.onnx") == (ExternalFile("w.bias", 40_000),)
    assert len(files["w.bias"]) == 40_000


def test_side_files_of_constants_and_of_inner_graphs_are_found(folder: Path) -> None:
    import onnx
    from onnx import TensorProto, external_data_helper, helper

    def outside(name: str) -> onnx.TensorProto:
        tensor = helper.make_tensor(name, TensorProto.FLOAT, [2], b"\0" * 8, raw=True)
        external_data_helper.set_external_data(tensor, name, offset=4, length=8)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        return tensor

    inner = helper.make_graph(
        [helper.make_node("Constant", [], ["b"], value=outside("inner"))],
        "inner",
        [],
        [helper.make_tensor_value_info("b", TensorProto.FLOAT, [2])],
    )
    condition = helper.make_tensor("c", TensorProto.BOOL, [], [True])
    graph = helper.make_graph(
        [
            helper.make_node("Constant", [], ["a"], value=outside("Constant_2217_attr__value")),
            helper.make_node("Constant", [], ["c"], value=condition),
            helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner),
        ],
        "outer",
        [],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])],
    )
    path = folder / "nested.onnx"
    path.write_bytes(helper.make_model(graph).SerializeToString())
    found = {side.location: side.min_bytes for side in external_files(path)}
    assert found == {"Constant_2217_attr__value": 12, "inner": 12}


WHOLE = onnx_bytes(64)


@given(st.integers(0, len(WHOLE) - 1))
def test_no_torn_model_passes_for_a_whole_one_unless_it_ends_at_a_field(cut: int) -> None:
    import tempfile

    import onnx

    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "torn.onnx"
        path.write_bytes(WHOLE[:cut])
        try:
            external_files(path)
        except NotOnnx:
            return
        model = onnx.ModelProto()  # what passes is at least a model to the real parser
        model.ParseFromString(WHOLE[:cut])
        assert model.HasField("graph")


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"\x00" * 50, b"version 1"])
def test_something_else_is_not_taken_for_a_model(folder: Path, content: bytes) -> None:
    path = folder / "else.onnx"
    path.write_bytes(content)
    with pytest.raises(NotOnnx):
        external_files(path)


def scattered_onnx(folder: Path, count: int) -> Path:
    """A chain of additions whose weights lie in one file each, as M-CLIP's exports have them."""
    import numpy as np
    from onnx import TensorProto, external_data_helper, helper, numpy_helper

    graph = helper.make_graph(
        [helper.make_node("Add", [f"v{i}", f"w{i}"], [f"v{i + 1}"]) for i in range(count)],
        "scattered",
        [helper.make_tensor_value_info("v0", TensorProto.FLOAT, [100])],
        [helper.make_tensor_value_info(f"v{count}", TensorProto.FLOAT, [100])],
        [numpy_helper.from_array(np.full(100, i, np.float32), f"w{i}") for i in range(count)],
    )
    for tensor in graph.initializer:
        name = f"Constant_{tensor.name}_attr__value"
        external_data_helper.set_external_data(tensor, name)
        (folder / name).write_bytes(tensor.raw_data)
        tensor.ClearField("raw_data")
    path = folder / "model.onnx"
    opset = helper.make_opsetid("", 17)
    path.write_bytes(helper.make_model(graph, opset_imports=[opset]).SerializeToString())
    return path


def test_weights_in_hundreds_of_files_are_all_found_and_counted(tmp_path: Path) -> None:
    path = scattered_onnx(tmp_path, 390)
    assert len(weight_files(path)) == 391
    assert weight_bytes(path) == path.stat().st_size + 390 * 400


@pytest.mark.parametrize("stray", [".DS_Store", "model.onnx.old", "tokenizer.bin"])
def test_files_that_the_graph_does_not_name_are_no_weights(tmp_path: Path, stray: str) -> None:
    path = scattered_onnx(tmp_path, 3)
    before = (weight_files(path), weight_bytes(path))
    (tmp_path / stray).write_bytes(bytes(1000))
    assert (weight_files(path), weight_bytes(path)) == before


OUTSIDE = ["../w.bin", "/etc/passwd", "a/../../w.bin", "..", "a/..", "w\0.bin", "."]


@pytest.mark.parametrize("location", OUTSIDE)
def test_weights_outside_the_models_folder_are_refused(tmp_path: Path, location: str) -> None:
    import onnx

    external_onnx(tmp_path)
    path = tmp_path / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    next(
        e for e in model.graph.initializer[0].external_data if e.key == "location"
    ).value = location
    path.write_bytes(model.SerializeToString())
    with pytest.raises(NotOnnx, match="outside the model's folder"):
        weight_files(path)
    assert weight_bytes(path) == path.stat().st_size


def test_a_place_in_a_side_file_that_is_no_number_is_refused(tmp_path: Path) -> None:
    import onnx

    external_onnx(tmp_path)
    model = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    model.graph.initializer[0].external_data.add(key="length", value="many")
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(NotOnnx, match="'many'"):
        external_files(tmp_path / "model.onnx")


def test_side_files_of_a_models_own_functions_are_found(tmp_path: Path) -> None:
    import onnx
    from onnx import TensorProto, external_data_helper, helper

    files = external_onnx(tmp_path)
    model = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    tensor = helper.make_tensor("c", TensorProto.FLOAT, [2], b"\0" * 8, raw=True)
    external_data_helper.set_external_data(tensor, "function.bin", 0, 8)
    tensor.ClearField("raw_data")
    body = [helper.make_node("Constant", [], ["c"], value=tensor)]
    opset = helper.make_opsetid("", 17)
    model.functions.append(helper.make_function("own", "f", [], ["c"], body, [opset]))
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    names = [file.name for file in weight_files(tmp_path / "model.onnx")]
    assert names == ["model.onnx", "function.bin", *(name for name in files if name == "w.bias")]


def test_an_absent_model_counts_nothing(tmp_path: Path) -> None:
    assert weight_bytes(tmp_path / "none.onnx") == 0
