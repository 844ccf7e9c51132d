"""Why a pass left a node alone: for each pass a graph that nearly matches, and what differs."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from doubles.onnx_models import FLOAT, ints, make_model, node, randn, save, scalar, value
from onnx import NodeProto
from typer.testing import CliRunner

from immich_ml_metal.onnx_mlx.__main__ import app
from immich_ml_metal.onnx_mlx.explain import explain
from immich_ml_metal.onnx_mlx.passes import PASSES

NUMBERS = {
    "one": scalar(1),
    "two": scalar(2),
    "three": scalar(3),
    "six": scalar(6),
    "half": scalar(0.5),
    "zero": scalar(0),
    "root2": scalar(math.sqrt(2)),
    "eps": scalar(1e-5),
}
ROWS, PICTURE = [2, 5, 4], [2, 3, 6, 6]
NORM = {"scale": randn(4), "shift": randn(4, seed=1), "axis": ints(-1), "early": ints(1)}
WEIGHTS = {"w": randn(3, 3, 3, 3), "m": randn(4, 6), "b": randn(6), "wrong": randn(5, 6)}
STATS = {f"s{i}": np.abs(randn(3, seed=i)) for i in range(4)}


def why(
    folder: Path,
    nodes: Sequence[NodeProto],
    rewriting: str,
    shape: Sequence[int] = ROWS,
    results: str = "y",
) -> dict[str, str]:
    """What one pass says, by the operator it looked at."""
    constants = {**NUMBERS, **NORM, **WEIGHTS, **STATS}
    used = {name for n in nodes for name in n.input}
    kept = {name: array for name, array in constants.items() if name in used}
    inputs = [value("x", FLOAT, [None, *shape[1:]])]
    if "z" in used:
        inputs.append(value("z", FLOAT, [None, *shape[1:]]))
    path = save(make_model(nodes, inputs, results.split(), kept), folder)
    found = explain(path).left_alone
    return {one.node.op: one.reason for one in found if one.rewriting == rewriting}


def gelu(inner: str = "root2", added: str = "one", halved: str = "half") -> list[NodeProto]:
    return [
        node("Div", f"x {inner}", "d"),
        node("Erf", "d", "e"),
        node("Add", f"e {added}", "a"),
        node("Mul", "a x", "p"),
        node("Mul", f"p {halved}", "y"),
    ]


@pytest.mark.parametrize(
    ("nodes", "results", "reason"),
    [
        (gelu(inner="two"), "y", "erf looks at x * 0.5, not at x / sqrt(2)"),
        (gelu(added="two"), "y", "adds 2.0, not 1"),
        (gelu(halved="two"), "y", "multiplies by 2, not by 0.5"),
        (gelu(), "y e", "'e' is a result of the model"),
        ([node("Erf", "x", "y")], "y", "'x' is an input of the model, not from Mul or Div"),
    ],
)
def test_gelu(tmp_path: Path, nodes: list[NodeProto], results: str, reason: str) -> None:
    assert reason in why(tmp_path, nodes, "gelu", results=results)["Erf"]


def test_swish(tmp_path: Path) -> None:
    other = [node("Relu", "x", "r"), node("Sigmoid", "x", "g"), node("Mul", "r g", "y")]
    assert why(tmp_path, other, "swish") == {
        "Sigmoid": "'x' is an input of the model, not from Mul or Div"
    }
    shared = [node("Sigmoid", "x", "g"), node("Mul", "x g", "p"), node("Add", "p g", "y")]
    assert (
        "'g' is needed by Mul 'Mul:p' and Add 'Add:y'" in why(tmp_path, shared, "swish")["Sigmoid"]
    )


def hard_swish(shift: str = "three", top: str = "six", divisor: str = "six") -> list[NodeProto]:
    return [
        node("Add", f"x {shift}", "a"),
        node("Clip", f"a zero {top}", "c"),
        node("Mul", "x c", "p"),
        node("Div", f"p {divisor}", "y"),
    ]


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [
        (hard_swish(shift="two"), "adds 2.0, not 3"),
        (hard_swish(top="two"), "it clips to [0.0, 2.0], not to [0, 6]"),
        (hard_swish(divisor="two"), "multiplies by 0.5, not by 1/6"),
    ],
)
def test_hard_swish(tmp_path: Path, nodes: list[NodeProto], reason: str) -> None:
    assert reason in why(tmp_path, nodes, "hard_swish")["Clip"]


def test_hard_swish_of_a_gate(tmp_path: Path) -> None:
    steep = [node("HardSigmoid", "x", "g", alpha=0.2), node("Mul", "x g", "y")]
    assert "it is x * 0.2 + 0.5" in why(tmp_path, steep, "hard_swish")["HardSigmoid"]


def attention(perm: Sequence[int] = (0, 2, 1), axis: int = -1, mask: str = "") -> list[NodeProto]:
    scores = "masked" if mask else "qk"
    added = [node("Add", f"qk {mask}", "masked")] if mask else []
    return [
        node("Transpose", "x", "t", perm=list(perm)),
        node("MatMul", "x t", "qk"),
        *added,
        node("Softmax", scores, "p", axis=axis),
        node("MatMul", "p x", "y"),
    ]


def test_attention(tmp_path: Path) -> None:
    assert why(tmp_path, attention(), "attention") == {}
    columns = why(tmp_path, attention(axis=1), "attention")
    assert columns == {"Softmax": "axis 1 is not known to be the last"}
    shown = why(tmp_path, attention(), "attention", results="y p")
    assert shown == {"Softmax": "'p' is a result of the model"}
    scaled = attention(mask="one")
    scaled.insert(3, node("Mul", "masked half", "scaled"))
    scaled[4].input[0] = "scaled"
    assert "scales the mask too" in why(tmp_path, scaled, "attention")["Softmax"]
    lone = [node("Softmax", "x", "p"), node("Relu", "p", "y")]
    assert "goes to Relu 'Relu:y', not to MatMul" in why(tmp_path, lone, "attention")["Softmax"]


def test_linear(tmp_path: Path) -> None:
    def nodes(bias: str) -> list[NodeProto]:
        return [node("MatMul", "x m", "p"), node("Add", f"p {bias}", "y")]

    assert why(tmp_path, nodes("b"), "linear") == {}
    assert why(tmp_path, nodes("wrong"), "linear") == {
        "MatMul": "Add 'Add:y' adds a constant of shape (5, 6), not (6,)"
    }
    bare = [node("MatMul", "x m", "p"), node("Relu", "p", "y")]
    assert "goes to Relu" in why(tmp_path, bare, "linear")["MatMul"]
    product = [node("Transpose", "x", "t", perm=[0, 2, 1]), node("MatMul", "x t", "y")]
    assert "'t' is no constant" in why(tmp_path, product, "linear")["MatMul"]


def layer_norm(
    axis: str = "axis", power: str = "two", epsilon: str = "eps", bias: str = "shift"
) -> list[NodeProto]:
    return [
        node("ReduceMean", f"x {axis}", "mean"),
        node("Sub", "x mean", "c"),
        node("Pow", f"c {power}", "sq"),
        node("ReduceMean", "sq axis", "var"),
        node("Add", f"var {epsilon}", "ve"),
        node("Sqrt", "ve", "sd"),
        node("Div", "c sd", "n"),
        node("Mul", "n scale", "ns"),
        node("Add", f"ns {bias}", "y"),
    ]


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [
        (layer_norm(axis="early"), "is over the axes [1], not known to be the last"),
        (layer_norm(power="three"), "has the exponent 3.0, not 2"),
        (layer_norm(epsilon="scale"), "adds no constant of one element"),
        (layer_norm(bias="x"), "'x' is no constant of one axis"),
    ],
)
def test_layer_norm(tmp_path: Path, nodes: list[NodeProto], reason: str) -> None:
    assert reason in why(tmp_path, nodes, "layer_norm")["Div"]


def test_batch_norm(tmp_path: Path) -> None:
    def nodes(source: str) -> list[NodeProto]:
        return [
            node("Conv", "x w", "c"),
            node("Relu", "c", "r"),
            node("BatchNormalization", f"{source} s0 s1 s2 s3", "n"),
            node("Add", "n r", "y"),
        ]

    name = "BatchNormalization"
    assert "comes from Relu" in why(tmp_path, nodes("r"), "batch_norm", PICTURE)[name]
    assert "is needed by Relu" in why(tmp_path, nodes("c"), "batch_norm", PICTURE)[name]


def test_conv_bias(tmp_path: Path) -> None:
    nodes = [node("Conv", "x w", "c"), node("Add", "c root2", "y")]
    reason = why(tmp_path, nodes, "conv_bias", PICTURE)["Conv"]
    assert reason == "'root2' has the shape (), not (1, 3, 1, 1)"


def test_idle(tmp_path: Path) -> None:
    nodes = [node("Cast", "x", "f", to=FLOAT), node("Relu", "f", "y")]
    assert why(tmp_path, nodes, "idle") == {"Cast": "'x' is not known to be floating already"}
    shown = [node("Relu", "x", "r"), node("Identity", "r", "y")]
    assert why(tmp_path, shown, "idle") == {"Identity": "it makes a result of the model"}


def test_layout(tmp_path: Path) -> None:
    nodes = [
        node("Conv", "x w", "c", pads=[1, 1, 1, 1]),
        node("Add", "c z", "a"),
        node("Conv", "z w", "d", pads=[1, 1, 1, 1]),
        node("Flatten", "d", "f"),
        node("Flatten", "a", "g"),
        node("Add", "f g", "y"),
    ]
    found = why(tmp_path, nodes, "layout", PICTURE)
    assert found["Add"] == "'z' is neither channels-last nor a constant"
    assert found["Flatten"] == "it knows channels-first only, and ['d'] is channels-last"


def test_transposes(tmp_path: Path) -> None:
    nodes = [
        node("Transpose", "x", "t", perm=[0, 2, 1]),
        node("Transpose", "t", "y", perm=[0, 2, 1]),
    ]
    found = why(tmp_path, nodes, "transposes")
    assert found == {"Transpose": "it changes nothing, but makes a result of the model"}


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [
        ([node("Softmax", "x", "y", axis=0)], "it works along axis 0, rows lie on 0"),
        ([node("Concat", "x x", "y", axis=0)], "it joins along the rows"),
        ([node("Einsum", "x m", "y", equation="bij,jk->bik")], "no rule for rows"),
        ([node("ReduceSum", "x", "y")], "it reduces the axes [0, 1, 2], rows lie on 0"),
    ],
)
def test_batch(tmp_path: Path, nodes: list[NodeProto], reason: str) -> None:
    used = {name for n in nodes for name in n.input}
    kept = {name: array for name, array in WEIGHTS.items() if name in used}
    model = make_model(nodes, [value("x", FLOAT, [1, 5, 4])], ["y"], kept)
    (found,) = (
        one for one in explain(save(model, tmp_path)).left_alone if one.rewriting == "batch"
    )
    assert found.node.op == nodes[0].op_type
    assert reason in found.reason


def test_every_pass_has_a_test_here_that_makes_it_speak() -> None:
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert tested >= {*PASSES, "batch"}


def test_the_command_says_why_only_when_it_is_asked(tmp_path: Path) -> None:
    nodes = gelu(added="two")
    model = make_model(nodes, [value("x", FLOAT, [None, 4])], ["y"], NUMBERS)
    path = str(save(model, tmp_path))
    assert "left alone" not in CliRunner().invoke(app, [path]).output
    output = CliRunner().invoke(app, [path, "--why"]).output
    assert "gelu" in output
    assert "Add 'Add:a' adds 2.0, not 1" in output


def test_where_nothing_was_left_alone_the_command_says_so(tmp_path: Path) -> None:
    model = make_model([node("Relu", "x", "y")], [value("x", FLOAT, [None, 4])], ["y"], {})
    output = CliRunner().invoke(app, [str(save(model, tmp_path)), "--why"]).output
    assert output.splitlines()[-2:] == ["why nodes were left alone", "  none was"]
