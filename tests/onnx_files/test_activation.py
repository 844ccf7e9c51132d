"""The three GELUs, written out as exporters do and as one node, in one file and in another."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper

from immich_ml_metal.onnx_files.activation import read_activation
from immich_ml_metal.onnx_files.protobuf import NotOnnx

SCALARS = {"quick": 1.702, "half": 0.5, "one": 1.0, "root": 1.4142135, "pi": 0.79788456}
SCALARS |= {"cube": 0.044715, "alpha": 1.0}


def written_out(kind: str, *, prefix: str = "", x: str = "x", y: str = "y") -> list[NodeProto]:
    def node(op: str, inputs: list[str], output: str) -> NodeProto:
        names = [name if name in SCALARS or name == x else prefix + name for name in inputs]
        return helper.make_node(op, names, [output if output == y else prefix + output])

    if kind == "quick":
        return [
            node("Mul", [x, "quick"], "a"),
            node("Sigmoid", ["a"], "b"),
            node("Mul", [x, "b"], y),
        ]
    if kind == "erf":
        return [
            node("Div", [x, "root"], "a"),
            node("Erf", ["a"], "b"),
            node("Add", ["b", "one"], "c"),
            node("Mul", [x, "c"], "d"),
            node("Mul", ["d", "half"], y),
        ]
    return [
        node("Mul", [x, x], "a"),
        node("Mul", ["a", x], "b"),
        node("Mul", ["b", "cube"], "c"),
        node("Add", [x, "c"], "d"),
        node("Mul", ["d", "pi"], "e"),
        node("Tanh", ["e"], "f"),
        node("Add", ["f", "one"], "g"),
        node("Mul", [x, "g"], "h"),
        node("Mul", ["h", "half"], y),
    ]


def save(
    folder: Path, nodes: list[NodeProto], *, dtype: type = np.float32, as_nodes: bool = False
) -> Path:
    used = {name for node in nodes for name in node.input} & set(SCALARS)
    tensors = [numpy_helper.from_array(np.array(SCALARS[name], dtype), name) for name in used]
    if as_nodes:
        constants = [helper.make_node("Constant", [], [t.name], value=t) for t in tensors]
        nodes, tensors = [*constants, *nodes], []
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", kind, [4])],
        [helper.make_tensor_value_info("y", kind, [4])],
        tensors,
    )
    path = folder / "model.onnx"
    onnx.save(helper.make_model(graph), path)
    return path


@pytest.mark.parametrize("kind", ["erf", "tanh", "quick"])
@pytest.mark.parametrize("as_nodes", [False, True], ids=["initializers", "constants"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_what_an_exporter_wrote_out_is_recognised(
    tmp_path: Path, kind: str, as_nodes: bool, dtype: type
) -> None:
    path = save(tmp_path, written_out(kind), as_nodes=as_nodes, dtype=dtype)
    assert read_activation(path) == kind


@pytest.mark.parametrize(
    ("node", "kind"),
    [
        (helper.make_node("Gelu", ["x"], ["y"]), "erf"),
        (helper.make_node("Gelu", ["x"], ["y"], approximate="tanh"), "tanh"),
        (helper.make_node("Gelu", ["x"], ["y"], domain="com.microsoft"), "erf"),
        (helper.make_node("FastGelu", ["x"], ["y"], domain="com.microsoft"), "tanh"),
        (helper.make_node("QuickGelu", ["x"], ["y"], domain="com.microsoft"), "quick"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.domain + value.op_type,
)
def test_one_node_for_all_of_it_is_recognised(tmp_path: Path, node: NodeProto, kind: str) -> None:
    assert read_activation(save(tmp_path, [node])) == kind


def test_a_sigmoid_or_tanh_for_another_purpose_is_no_gelu(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Mul", ["x", "alpha"], ["a"]),
        helper.make_node("Sigmoid", ["a"], ["b"]),  # SiLU
        helper.make_node("Mul", ["x", "b"], ["c"]),
        helper.make_node("Tanh", ["c"], ["d"]),  # a pooler's
        helper.make_node("Relu", ["d"], ["y"]),
    ]
    assert read_activation(save(tmp_path, nodes)) == "none"


def test_a_graph_that_mixes_two_names_both(tmp_path: Path) -> None:
    nodes = [
        *written_out("erf", prefix="1", y="middle"),
        helper.make_node("QuickGelu", ["1middle"], ["y"], domain="com.microsoft"),
    ]
    assert read_activation(save(tmp_path, nodes)) == "erf+quick"


def test_a_local_function_counts(tmp_path: Path) -> None:
    function = helper.make_function(
        "own", "gelu", ["x"], ["y"], [helper.make_node("Erf", ["x"], ["y"])],
        [helper.make_opsetid("", 18)],
    )  # fmt: skip
    graph = helper.make_graph(
        [helper.make_node("gelu", ["x"], ["y"], domain="own")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])],
    )
    onnx.save(helper.make_model(graph, functions=[function]), tmp_path / "model.onnx")
    assert read_activation(tmp_path / "model.onnx") == "erf"


@pytest.mark.parametrize("content", [b"", b"not a model at all"])
def test_something_else_is_an_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(NotOnnx):
        read_activation(tmp_path / "model.onnx")
