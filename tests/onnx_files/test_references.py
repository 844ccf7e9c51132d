from pathlib import Path

import pytest
from doubles.hub import external_onnx, onnx_bytes
from hypothesis import given
from hypothesis import strategies as st

from immich_ml_metal.onnx_files.references import ExternalFile, NotOnnx, external_files


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
