"""Graphs exported for one row take any number, and each row is what it would be alone."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from doubles.onnx_models import (
    FLOAT,
    INT32,
    Array,
    assert_close,
    ints,
    make_model,
    node,
    randn,
    run_ort,
    run_program,
    save,
    value,
)
from hypothesis import given
from hypothesis import strategies as st

from immich_ml_metal.onnx_graph.reader import read
from immich_ml_metal.onnx_mlx.lower import lower
from immich_ml_metal.onnx_mlx.passes.row_rules import place_rows

ROWS = 3


def check(model: onnx.ModelProto, folder: Path, feeds: dict[str, Array]) -> None:
    """Three rows at once give what ONNX Runtime gives for each alone."""
    lowered = lower(read(save(model, folder)))
    assert (lowered.batched, lowered.reason) == (True, "")
    alone = [
        run_ort(model, {name: array[row : row + 1] for name, array in feeds.items()})
        for row in range(ROWS)
    ]
    expected = [np.concatenate(rows) for rows in zip(*alone, strict=True)]
    assert_close(run_program(lowered.program, feeds), expected)


def refusal(model: onnx.ModelProto, folder: Path) -> str:
    lowered = lower(read(save(model, folder)))
    assert not lowered.batched
    return lowered.reason


def shapes(**values: Sequence[int]) -> dict[str, Array]:
    return {name: ints(*shape) for name, shape in values.items()}


HEADS, LENGTH, DEPTH = 2, 5, 4
WIDTH = HEADS * DEPTH


def tower(*, sequence_first: bool) -> onnx.ModelProto:
    """A block of attention as PyTorch exports it for a batch of 1, class token included.

    Sequence first: (L, 1, E) → (L, heads, d) → (heads, L, d), the batch merged into the heads, and
    out again through a matrix of L * 1 rows.
    """
    nodes = [node("Concat", "token x", "t", axis=1), node("Add", "t positions", "p")]
    constants = {
        "token": randn(1, 1, WIDTH, seed=1),
        "positions": randn(LENGTH, WIDTH, seed=2),
        "wq": randn(WIDTH, WIDTH, seed=3),
        "wk": randn(WIDTH, WIDTH, seed=4),
        "wv": randn(WIDTH, WIDTH, seed=5),
        "wo": randn(WIDTH, WIDTH, seed=6),
        "bo": randn(WIDTH, seed=7),
        "root": np.array(DEPTH**-0.25, np.float32),
        "first": np.array(0, np.int64),
    }
    if sequence_first:
        nodes.append(node("Transpose", "p", "s", perm=[1, 0, 2]))
        constants |= shapes(
            heads=(LENGTH, HEADS, DEPTH), four=(1, HEADS, LENGTH, DEPTH), rows=(LENGTH, WIDTH),
            back=(LENGTH, 1, WIDTH),
        )  # fmt: skip
        for name in "qkv":
            nodes += [
                node("MatMul", f"s w{name}", f"{name}1"),
                node("Reshape", f"{name}1 heads", f"{name}2"),
                node("Transpose", f"{name}2", f"{name}3", perm=[1, 0, 2]),
                node("Reshape", f"{name}3 four", f"{name}4"),
            ]
        after = [
            node("Transpose", "o", "o1", perm=[2, 0, 1, 3]),
            node("Reshape", "o1 rows", "o2"),
            node("Gemm", "o2 wo bo", "o3", transB=1),
            node("Reshape", "o3 back", "o4"),
            node("Transpose", "o4", "o5", perm=[1, 0, 2]),
        ]
    else:
        constants |= shapes(heads=(1, LENGTH, HEADS, DEPTH), back=(1, LENGTH, WIDTH))
        for name in "qkv":
            nodes += [
                node("MatMul", f"p w{name}", f"{name}1"),
                node("Reshape", f"{name}1 heads", f"{name}2"),
                node("Transpose", f"{name}2", f"{name}4", perm=[0, 2, 1, 3]),
            ]
        after = [
            node("Transpose", "o", "o1", perm=[0, 2, 1, 3]),
            node("Reshape", "o1 back", "o2"),
            node("MatMul", "o2 wo", "o3"),
            node("Add", "o3 bo", "o5"),
        ]
    nodes += [
        node("Transpose", "k4", "kt", perm=[0, 1, 3, 2]),
        node("Mul", "q4 root", "qs"),
        node("Mul", "kt root", "ks"),
        node("MatMul", "qs ks", "scores"),
        node("Softmax", "scores", "weights", axis=-1),
        node("MatMul", "weights v4", "o"),
        *after,
        node("Add", "p o5", "sum"),
        node("Gather", "sum first", "y", axis=1),
    ]
    x = value("x", FLOAT, [1, LENGTH - 1, WIDTH])
    return make_model(nodes, [x], [value("y", FLOAT, [1, WIDTH])], constants)


@pytest.mark.parametrize("sequence_first", [True, False])
def test_a_transformer_block_keeps_its_rows_apart(sequence_first: bool, tmp_path: Path) -> None:
    model = tower(sequence_first=sequence_first)
    check(model, tmp_path, {"x": randn(ROWS, LENGTH - 1, WIDTH)})
    program = lower(read(tmp_path / "model.onnx")).program
    assert "Sdpa" in {n.op for n in program.nodes}  # the fused kernel serves all rows at once


TOKENS = np.random.default_rng(0).integers(1, 30, (ROWS, LENGTH)).astype(np.int32)
TABLE = {"table": randn(30, WIDTH, seed=1)}
POOLED = [value("y", FLOAT, [1, WIDTH])]


def text_model(nodes: list[onnx.NodeProto], **constants: Array) -> onnx.ModelProto:
    """Embeds tokens as `e`, and finds the largest one as `best` (a vector)."""
    start = [
        node("Gather", "table text", "e"),
        node("ArgMax", "text", "best", axis=-1, keepdims=0),
    ]
    text = value("text", INT32, [1, LENGTH])
    return make_model([*start, *nodes], [text], POOLED, {**TABLE, **constants})


def test_pooling_by_position_in_one_long_list_picks_from_the_own_row(tmp_path: Path) -> None:
    """TorchScript's way: flatten rows and positions, add the start of each row (here 0)."""
    nodes = [
        node("Flatten", "e", "f", axis=2),
        node("Add", "best zero", "i"),
        node("Gather", "f i", "y"),
    ]
    check(text_model(nodes, zero=ints(0)), tmp_path, {"text": TOKENS})


def test_pooling_by_coordinates_picks_from_the_own_row(tmp_path: Path) -> None:
    """Dynamo's way: coordinates (row, position), the row number a constant 0."""
    nodes = [
        node("Unsqueeze", "best last", "b"),
        node("Concat", "zero b", "i", axis=-1),
        node("GatherND", "e i", "y"),
    ]
    model = text_model(nodes, zero=ints(0).reshape(1, 1), last=ints(-1))
    check(model, tmp_path, {"text": TOKENS})


def test_a_mask_gathered_from_one_long_list_is_that_of_the_own_row(tmp_path: Path) -> None:
    """XLM-R's way: the mask of all positions, gathered as (1, 1, 1, L)."""
    nodes = [
        node("Equal", "text pad", "p"),
        node("Cast", "p", "m", to=1),
        node("Flatten", "m", "f", axis=2),
        node("Gather", "f places", "g"),
        node("Reshape", "g flat", "r"),
        node("Reshape", "r column", "c"),
        node("Mul", "e c", "w"),
        node("ReduceSum", "w one", "y", keepdims=0),
    ]
    places = np.arange(LENGTH).reshape(1, 1, 1, LENGTH)
    extra = shapes(flat=(-1,), column=(1, LENGTH, 1), one=(1,))
    model = text_model(nodes, pad=np.array(7, np.int32), places=places, **extra)
    check(model, tmp_path, {"text": np.where(TOKENS % 2, 7, TOKENS).astype(np.int32)})


def test_looking_up_in_a_constant_row_serves_every_row(tmp_path: Path) -> None:
    nodes = [
        node("GatherElements", "kinds text", "k", axis=1),
        node("Gather", "table k", "e2"),
        node("ReduceMean", "e2", "y", axes=[1], keepdims=0),
    ]
    kinds = np.arange(30)[None, ::-1].copy()
    text = value("text", INT32, [1, LENGTH])
    model = make_model(nodes, [text], POOLED, {**TABLE, "kinds": kinds}, 17)
    check(model, tmp_path, {"text": TOKENS})


def test_a_convolution_network_keeps_its_rows_apart(tmp_path: Path) -> None:
    nodes = [
        node("Conv", "x w", "c"),
        node("Relu", "c", "r"),
        node("MaxPool", "r", "m", kernel_shape=[2, 2]),
        node("Reshape", "m flat", "f"),
        node("MatMul", "f fc", "y"),
    ]
    constants = {"w": randn(4, 3, 3, 3), "fc": randn(4 * 25, 6, seed=1), "flat": ints(1, 100)}
    x = value("x", FLOAT, [1, 3, 8, 8])
    model = make_model(nodes, [x], [value("y", FLOAT, [1, 6])], constants)
    check(model, tmp_path, {"x": randn(ROWS, 3, 8, 8)})


def single(
    op: str, inputs: str, constants: dict[str, Array], **attributes: object
) -> onnx.ModelProto:
    x = value("x", FLOAT, [1, 4, 6])
    y = value("y", FLOAT, None)
    return make_model([node(op, inputs, "y", **attributes)], [x], [y], constants)


MIXING = {
    "softmax over the rows": single("Softmax", "x", {}, axis=0),
    "sum over the rows": single("ReduceSum", "x", {}, keepdims=1),
    "rows into features": single("Reshape", "x s", {"s": ints(24)}),
    "reverse of the rows": single(
        "Slice", "x a b c d", {"a": ints(-1), "b": ints(-9), "c": ints(0), "d": ints(-1)}
    ),
    "a product over the rows": single("Gemm", "f m", {"m": randn(1, 1)}, transA=1),
}
MIXING["a product over the rows"].graph.node.insert(0, node("Flatten", "x", "f"))


@pytest.mark.parametrize("kind", MIXING)
def test_what_mixes_rows_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    reason = refusal(MIXING[kind], tmp_path)
    operator = MIXING[kind].graph.node[-1].op_type
    assert operator in reason or "'y' does not hold one row" in reason


def test_an_operator_without_a_rule_is_refused_by_name(tmp_path: Path) -> None:
    model = single("Einsum", "x w", {"w": randn(6, 2)}, equation="bij,jk->bik")
    assert refusal(model, tmp_path) == (
        "Einsum 'Einsum:y': there is no rule for rows through this operator"
    )


def test_a_graph_with_free_shapes_is_left_as_it_is(tmp_path: Path) -> None:
    x, y = value("x", FLOAT, [None, 4]), value("y", FLOAT, [None, 4])
    lowered = lower(read(save(make_model([node("Relu", "x", "y")], [x], [y]), tmp_path)))
    assert lowered.batched
    assert lowered.reason == "its input shapes are free already"


def test_the_rewriting_can_be_switched_off(tmp_path: Path) -> None:
    path = save(tower(sequence_first=True), tmp_path)
    assert not lower(read(path), skip={"batch"}).batched


@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.integers(1, 24))
def test_rows_are_placed_where_as_many_elements_come_before(shape: list[int], before: int) -> None:
    found = place_rows(tuple(shape), before)
    prefixes = {math.prod(shape[:axis]) for axis in range(len(shape) + 1)}
    assert (found is None) == (before not in prefixes)
    if found is None:
        return
    axis, outer = found
    assert math.prod(shape[:axis]) * outer == before
    assert shape[axis] % outer == 0
