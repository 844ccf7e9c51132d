"""Each pass on its own: what it finds, that results stay, and that it can be switched off."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from doubles.onnx_models import (
    FLOAT,
    Array,
    assert_close,
    ints,
    lowered,
    make_model,
    node,
    randn,
    run_ort,
    run_program,
    save,
    scalar,
    value,
)

from immich_ml_metal.onnx_mlx.passes import PASSES


def ops(path: Path, *skip: str) -> Counter[str]:
    return Counter(n.op for n in lowered(path, skip).nodes)


def check(model: onnx.ModelProto, folder: Path, feeds: dict[str, Array], pass_name: str) -> Path:
    """Both with and without the pass, the result is ONNX Runtime's."""
    path = save(model, folder)
    expected = run_ort(model, feeds)
    assert_close(run_program(lowered(path), feeds), expected)
    assert_close(run_program(lowered(path, {pass_name}), feeds), expected)
    return path


B, H, L, D = 2, 3, 5, 4
HEADS = [B, H, L, D]


def attention_nodes(
    *, scale_on: str = "scores", mask: str = "", guard: bool = False
) -> list[onnx.NodeProto]:
    """Attention as exporters write it out; k is turned inside."""
    nodes = [node("Transpose", "k", "kt", perm=[0, 1, 3, 2])]
    q, kt, scores = "q", "kt", "qk"
    if scale_on == "both":
        nodes += [node("Mul", "q root", "qs"), node("Mul", "kt root", "kts")]
        q, kt = "qs", "kts"
    nodes.append(node("MatMul", f"{q} {kt}", "qk"))
    if scale_on == "scores":
        nodes.append(node("Div", "qk divisor", "scaled"))
        scores = "scaled"
    if mask:
        nodes.append(node("Add", f"{mask} {scores}", "masked"))
        scores = "masked"
    nodes.append(node("Softmax", scores, "weights", axis=-1))
    weights = "weights"
    if guard:
        nodes += [node("IsNaN", "weights", "bad"), node("Where", "bad zero weights", "safe")]
        weights = "safe"
    return [*nodes, node("MatMul", f"{weights} v", "y")]


def attention_model(nodes: Sequence[onnx.NodeProto], mask: Array | None = None) -> onnx.ModelProto:
    constants = {
        "root": scalar(D**-0.25),
        "divisor": scalar(D**0.5),
        "zero": scalar(0),
        "bias": np.triu(np.full((L, L), -np.inf, np.float32), 1) if mask is None else mask,
    }
    used = {name for n in nodes for name in n.input}
    inputs = [value(name, FLOAT, [None, H, L, D]) for name in "qkv"]
    kept = {name: array for name, array in constants.items() if name in used}
    return make_model(nodes, inputs, ["y"], kept)


QKV = {"q": randn(*HEADS), "k": randn(*HEADS, seed=1), "v": randn(*HEADS, seed=2)}


SOME_MASK = np.where(randn(L, L, seed=8) > 0.5, np.float32(-np.inf), randn(L, L, seed=9))
MASKS = {"no mask": None, "causal": None, "any": SOME_MASK, "for each head": randn(1, H, L, L)}


@pytest.mark.parametrize("scale_on", ["scores", "both", "nothing"])
@pytest.mark.parametrize("kind", MASKS)
def test_written_out_attention_is_fused(scale_on: str, kind: str, tmp_path: Path) -> None:
    nodes = attention_nodes(scale_on=scale_on, mask="" if kind == "no mask" else "bias")
    model = attention_model(nodes, MASKS[kind])
    path = check(model, tmp_path, QKV, "attention")
    assert ops(path) == {"Sdpa": 1}  # the turn of k, the scale and the mask are part of it
    assert ops(path, "attention")["Softmax"] == 1
    (fused,) = lowered(path).nodes
    assert bool(fused.attributes["causal"]) == (kind == "causal")
    assert len(fused.inputs) == (4 if kind in ("any", "for each head") else 3)


def test_a_row_that_sees_nothing_gives_zeros_where_the_export_guards_it(tmp_path: Path) -> None:
    mask = np.zeros((L, L), np.float32)
    mask[1] = -np.inf
    model = attention_model(attention_nodes(mask="bias", guard=True), mask)
    path = check(model, tmp_path, QKV, "attention")
    assert ops(path)["Sdpa"] == 1
    (result,) = run_program(lowered(path), QKV)
    assert (result[:, :, 1] == 0).all()


def test_attention_whose_weights_are_also_a_result_is_left_alone(tmp_path: Path) -> None:
    model = attention_model(attention_nodes())
    model.graph.output.append(value("weights", FLOAT, [None] * 4))
    assert ops(save(model, tmp_path))["Sdpa"] == 0


def test_a_scaled_mask_is_not_taken_for_a_mask(tmp_path: Path) -> None:
    nodes = attention_nodes(scale_on="nothing", mask="bias")
    nodes[3:3] = [node("Mul", "masked root", "late")]
    nodes[4].input[0] = "late"
    mask = randn(L, L, seed=3)
    path = check(attention_model(nodes, mask), tmp_path, QKV, "attention")
    assert ops(path)["Sdpa"] == 0


def test_softmax_over_another_axis_is_not_taken_for_attention(tmp_path: Path) -> None:
    nodes = attention_nodes(scale_on="nothing")
    nodes[2].attribute[0].i = 2
    path = check(attention_model(nodes), tmp_path, QKV, "attention")
    assert ops(path)["Sdpa"] == 0


def test_a_query_shared_by_all_rows_is_fused_and_broadcast(tmp_path: Path) -> None:
    model = attention_model(attention_nodes())
    del model.graph.input[0]
    model.graph.initializer.append(onnx.numpy_helper.from_array(randn(1, H, 1, D, seed=5), "q"))
    feeds = {name: QKV[name] for name in "kv"}
    assert ops(check(model, tmp_path, feeds, "attention"))["Sdpa"] == 1


@pytest.mark.parametrize("order", ["product bias", "bias product"])
def test_a_product_and_its_bias_become_one_operation(order: str, tmp_path: Path) -> None:
    nodes = [node("MatMul", "x w", "product"), node("Add", order, "y")]
    constants = {"w": randn(4, 5, seed=1), "bias": randn(5, seed=2)}
    model = make_model(nodes, [value("x", FLOAT, [None, 3, 4])], ["y"], constants)
    path = check(model, tmp_path, {"x": randn(2, 3, 4)}, "linear")
    assert ops(path) == {"Linear": 1}


def test_a_bias_that_is_not_for_each_column_is_left_alone(tmp_path: Path) -> None:
    nodes = [node("MatMul", "x w", "product"), node("Add", "product bias", "y")]
    constants = {"w": randn(4, 5, seed=1), "bias": randn(3, 1, seed=2)}
    model = make_model(nodes, [value("x", FLOAT, [None, 3, 4])], ["y"], constants)
    path = check(model, tmp_path, {"x": randn(2, 3, 4)}, "linear")
    assert ops(path)["Linear"] == 0


@pytest.mark.parametrize("square", ["Pow", "Mul"])
def test_a_written_out_layer_norm_is_recognised(square: str, tmp_path: Path) -> None:
    squares = node("Pow", "d two", "s") if square == "Pow" else node("Mul", "d d", "s")
    nodes = [
        node("ReduceMean", "x", "m", axes=[-1]),
        node("Sub", "x m", "d"),
        squares,
        node("ReduceMean", "s", "var", axes=[-1]),
        node("Add", "var eps", "ve"),
        node("Sqrt", "ve", "std"),
        node("Div", "d std", "n"),
        node("Mul", "n scale", "ns"),
        node("Add", "ns shift", "y"),
    ]
    constants = {
        "eps": scalar(1e-3),
        "scale": randn(4, seed=1),
        "shift": randn(4, seed=2),
        "two": scalar(2),
    }
    if square == "Mul":
        del constants["two"]
    model = make_model(nodes, [value("x", FLOAT, [None, 3, 4])], ["y"], constants, 17)
    path = check(model, tmp_path, {"x": randn(2, 3, 4)}, "layer_norm")
    assert ops(path) == {"LayerNormalization": 1}


GELU_ORDERS = {
    "x times erf, then half": [node("Mul", "x a", "p"), node("Mul", "p half", "y")],
    "half x times erf": [node("Mul", "x half", "p"), node("Mul", "p a", "y")],
    "half erf times x": [node("Mul", "a half", "p"), node("Mul", "p x", "y")],
}


@pytest.mark.parametrize("inner", ["Div", "Mul"])
@pytest.mark.parametrize("order", GELU_ORDERS)
def test_a_written_out_gelu_is_recognised(inner: str, order: str, tmp_path: Path) -> None:
    factor = math.sqrt(2) if inner == "Div" else math.sqrt(0.5)
    nodes = [
        node(inner, "x c", "i"),
        node("Erf", "i", "e"),
        node("Add", "e one", "a"),
        *GELU_ORDERS[order],
    ]
    constants = {"c": scalar(factor), "one": scalar(1), "half": scalar(0.5)}
    model = make_model(nodes, [value("x", FLOAT, [None, 4])], ["y"], constants)
    path = check(model, tmp_path, {"x": randn(3, 4)}, "gelu")
    assert ops(path) == {"Gelu": 1}


def test_a_gelu_keeps_the_factor_of_the_file(tmp_path: Path) -> None:
    """Half-precision files have 1.4140625 for the root of two: 1e-4 off, and so is the result."""
    nodes = [
        node("Div", "x c", "i"),
        node("Erf", "i", "e"),
        node("Add", "e one", "a"),
        *GELU_ORDERS["half x times erf"],
    ]
    constants = {"c": scalar(1.4140625), "one": scalar(1), "half": scalar(0.5)}
    model = make_model(nodes, [value("x", FLOAT, [None, 400])], ["y"], constants)
    path = check(model, tmp_path, {"x": randn(3, 400)}, "gelu")
    assert ops(path) == {"Gelu": 1}


def test_erf_with_another_factor_is_not_a_gelu(tmp_path: Path) -> None:
    nodes = [
        node("Div", "x c", "i"),
        node("Erf", "i", "e"),
        node("Add", "e one", "a"),
        *GELU_ORDERS["half x times erf"],
    ]
    constants = {"c": scalar(1.5), "one": scalar(1), "half": scalar(0.5)}
    model = make_model(nodes, [value("x", FLOAT, [None, 4])], ["y"], constants)
    path = check(model, tmp_path, {"x": randn(3, 4)}, "gelu")
    assert ops(path)["Gelu"] == 0


@pytest.mark.parametrize("alpha", [1.0, 1.702])
def test_quick_gelu_and_silu_are_recognised(alpha: float, tmp_path: Path) -> None:
    nodes = [node("Sigmoid", "x" if alpha == 1 else "i", "s"), node("Mul", "x s", "y")]
    constants = {} if alpha == 1 else {"c": scalar(alpha)}
    if constants:
        nodes.insert(0, node("Mul", "x c", "i"))
    model = make_model(nodes, [value("x", FLOAT, [None, 4])], ["y"], constants)
    path = check(model, tmp_path, {"x": randn(3, 4)}, "swish")
    assert ops(path) == {"Swish": 1}


SIX = {"three": scalar(3), "zero": scalar(0), "six": scalar(6)}


@pytest.mark.parametrize("last", ["product first", "division first"])
def test_hard_swish_is_recognised(last: str, tmp_path: Path) -> None:
    ends = {
        "product first": [node("Mul", "x c", "p"), node("Div", "p six", "y")],
        "division first": [node("Div", "c six", "p"), node("Mul", "x p", "y")],
    }
    nodes = [node("Add", "x three", "a"), node("Clip", "a zero six", "c"), *ends[last]]
    model = make_model(nodes, [value("x", FLOAT, [None, 4])], ["y"], SIX)
    path = check(model, tmp_path, {"x": 4 * randn(3, 4)}, "hard_swish")
    assert ops(path) == {"HardSwish": 1}


def test_hard_sigmoid_alone_is_recognised(tmp_path: Path) -> None:
    nodes = [
        node("Add", "x three", "a"),
        node("Clip", "a zero six", "c"),
        node("Div", "c six", "y"),
    ]
    model = make_model(nodes, [value("x", FLOAT, [None, 4])], ["y"], SIX)
    path = check(model, tmp_path, {"x": 4 * randn(3, 4)}, "hard_swish")
    assert ops(path) == {"HardSigmoid": 1}


NORM = {"g": randn(6, seed=3), "b": randn(6, seed=4), "m": randn(6, seed=5)}
PICTURE = {"x": randn(2, 4, 7, 8)}


@pytest.mark.parametrize("bias", [True, False])
def test_batch_norm_becomes_part_of_the_convolution(bias: bool, tmp_path: Path) -> None:
    names = "x w cb" if bias else "x w"
    nodes = [node("Conv", names, "c"), node("BatchNormalization", "c g b m var", "y", epsilon=1e-3)]
    constants = {**NORM, "w": randn(6, 4, 3, 3, seed=1), "var": np.ones(6, np.float32)}
    if bias:
        constants["cb"] = randn(6, seed=2)
    model = make_model(nodes, [value("x", FLOAT, [None, 4, 7, 8])], ["y"], constants)
    path = check(model, tmp_path, PICTURE, "batch_norm")
    assert ops(path)["BatchNormalization"] == 0
    assert ops(path, "batch_norm")["BatchNormalization"] == 1


@pytest.mark.parametrize("shape", [(6, 1, 1), (1, 6, 1, 1)])
def test_a_bias_added_after_the_convolution_becomes_its_own(
    shape: tuple[int, ...], tmp_path: Path
) -> None:
    nodes = [node("Conv", "x w", "c"), node("Add", "c bias", "y")]
    constants = {"w": randn(6, 4, 3, 3, seed=1), "bias": randn(*shape, seed=2)}
    model = make_model(nodes, [value("x", FLOAT, [None, 4, 7, 8])], ["y"], constants)
    path = check(model, tmp_path, PICTURE, "conv_bias")
    assert ops(path)["Add"] == 0


def test_a_map_added_after_the_convolution_is_not_a_bias(tmp_path: Path) -> None:
    nodes = [node("Conv", "x w", "c"), node("Add", "c map", "y")]
    constants = {"w": randn(6, 4, 3, 3, seed=1), "map": randn(6, 5, 6, seed=2)}
    model = make_model(nodes, [value("x", FLOAT, [None, 4, 7, 8])], ["y"], constants)
    assert ops(check(model, tmp_path, PICTURE, "conv_bias"))["Add"] == 1


def test_operations_without_effect_vanish(tmp_path: Path) -> None:
    nodes = [
        node("Identity", "x", "a"),
        node("Sigmoid", "a", "b"),
        node("Cast", "b", "c", to=1),
        node("Add", "c zero", "d"),
        node("Mul", "d one", "e"),
        node("Neg", "e", "y"),
    ]
    constants = {"zero": scalar(0), "one": scalar(1)}
    model = make_model(nodes, [value("x", FLOAT, [None, 4])], ["y"], constants)
    path = check(model, tmp_path, {"x": randn(3, 4)}, "idle")
    assert ops(path) == {"Sigmoid": 1, "Neg": 1}


def test_a_cast_from_integers_stays(tmp_path: Path) -> None:
    nodes = [node("Shape", "x", "n"), node("Cast", "i", "f", to=1), node("Add", "x f", "y")]
    inputs = [value("x", FLOAT, [None, 4]), value("i", 6, [None, 4])]
    path = save(make_model(nodes[1:], inputs, ["y"]), tmp_path)
    assert ops(path) == {"Cast": 1, "Add": 1}


def test_transpositions_in_a_row_become_one_or_none(tmp_path: Path) -> None:
    nodes = [
        node("Transpose", "x", "a", perm=[1, 2, 0]),
        node("Transpose", "a", "b", perm=[2, 0, 1]),
        node("Neg", "b", "c"),
        node("Transpose", "c", "d", perm=[0, 2, 1]),
        node("Transpose", "d", "y", perm=[2, 0, 1]),
    ]
    model = make_model(nodes, [value("x", FLOAT, [None, 3, 4])], ["y"])
    path = check(model, tmp_path, {"x": randn(2, 3, 4)}, "transposes")
    assert ops(path) == {"Neg": 1, "Transpose": 1}


def test_what_depends_on_constants_alone_is_folded(tmp_path: Path) -> None:
    nodes = [
        node("Shape", "x", "s"),
        node("Gather", "s last", "n"),
        node("Cast", "n", "f", to=1),
        node("Sqrt", "f", "r"),
        node("Div", "x r", "y"),
    ]
    model = make_model(nodes, [value("x", FLOAT, [2, 3, 4])], ["y"], {"last": ints(-1)})
    path = save(model, tmp_path)
    feeds = {"x": randn(2, 3, 4)}
    assert ops(path) == {"Div": 1}
    assert_close(run_program(lowered(path), feeds), run_ort(model, feeds))


def test_every_pass_can_be_switched_off_alone(tmp_path: Path) -> None:
    nodes = attention_nodes(mask="bias")
    model = attention_model(nodes)
    path = save(model, tmp_path)
    expected = run_ort(model, QKV)
    for name in PASSES:
        assert_close(run_program(lowered(path, {name}), QKV), expected)
    assert_close(run_program(lowered(path, set(PASSES)), QKV), expected)
