"""Convolution networks stay channels-last: how many turns there are, and that results stay."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from doubles.onnx_models import (
    FLOAT,
    UINT8,
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
    value,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from immich_ml_metal.onnx_graph.graph import Program

X = value("x", FLOAT, [None, 4, None, None])
PICTURE = {"x": randn(2, 4, 8, 12)}
WEIGHTS = {"w": randn(6, 4, 3, 3, seed=1), "v": randn(6, 6, 1, 1, seed=2)}
PAD = [1, 1, 1, 1]


def turns(program: Program) -> int:
    """Transpositions that only the layout wants."""
    return sum(bool(n.attributes.get("layout")) for n in program.nodes)


def check(model: onnx.ModelProto, folder: Path, feeds: dict[str, Array]) -> Program:
    program = lowered(save(model, folder))
    assert_close(run_program(program, feeds), run_ort(model, feeds))
    assert_close(
        run_program(lowered(folder / "model.onnx", {"layout"}), feeds), run_ort(model, feeds)
    )
    return program


FIRST = node("Conv", "x w", "c", pads=PAD)
LAST = node("Conv", "z v", "y")
S, T = np.array(0.5, np.float32), randn(6, 1, 1, seed=7)

BETWEEN: dict[str, tuple[list[onnx.NodeProto], dict[str, Array]]] = {
    "relu": ([node("Relu", "c", "z")], {}),
    "clip": ([node("Clip", "c s", "z")], {"s": S}),
    "residual": ([node("Relu", "c", "r"), node("Add", "c r", "z")], {}),
    "scalar": ([node("Mul", "c s", "z")], {"s": S}),
    "one number for each channel": ([node("Mul", "c t", "z")], {"t": T}),
    "same with a batch axis": ([node("Mul", "t c", "z")], {"t": T[None]}),
    "one number for each pixel": ([node("Add", "c t", "z")], {"t": randn(8, 12)}),
    "prelu": ([node("PRelu", "c t", "z")], {"t": T}),
    "pool": ([node("MaxPool", "c", "z", kernel_shape=[2, 2], strides=[2, 2])], {}),
    "mean pool": ([node("AveragePool", "c", "z", kernel_shape=[3, 3], pads=PAD)], {}),
    "upsampling": (
        [node("Resize", "c - s", "z", mode="nearest")],
        {"s": np.array([1, 1, 2, 2], np.float32)},
    ),
    "concat": (
        [node("Relu", "c", "r"), node("Concat", "c r", "cc", axis=1), node("Conv", "cc u", "z")],
        {"u": randn(6, 12, 1, 1)},
    ),
    "upsampling to the size of another": (
        [
            node("Shape", "x", "n", start=2),
            node("Shape", "c", "m", end=2),
            node("Concat", "m n", "o", axis=0),
            node("AveragePool", "c", "p", kernel_shape=[2, 2], strides=[2, 2]),
            node("Resize", "p - - o", "z", mode="nearest"),
        ],
        {},
    ),
    "squeeze and excite": (
        [
            node("GlobalAveragePool", "c", "g"),
            node("HardSigmoid", "g", "h"),
            node("Mul", "c h", "z"),
        ],
        {},
    ),
    "mean over pixels kept": (
        [node("ReduceMean", "c", "g", axes=[2, 3]), node("Sub", "c g", "z")],
        {},
    ),
    "channel softmax": ([node("Softmax", "c", "z", axis=1)], {}),
    "padding": ([node("Pad", "c p", "z")], {"p": ints(0, 0, 1, 2, 0, 0, 0, 1)}),
    "batch norm": (
        [node("Relu", "c", "r"), node("BatchNormalization", "r a b m q", "z")],
        {"a": randn(6), "b": randn(6), "m": randn(6), "q": np.ones(6, np.float32)},
    ),
    "transposed convolution": (
        [node("ConvTranspose", "c u", "z", strides=[2, 2])],
        {"u": randn(6, 6, 2, 2)},
    ),
}


@pytest.mark.parametrize("kind", BETWEEN)
def test_nothing_turns_the_picture_between_convolutions(kind: str, tmp_path: Path) -> None:
    nodes, constants = BETWEEN[kind]
    model = make_model([FIRST, *nodes, LAST], [X], ["y"], {**WEIGHTS, **constants}, 17)
    assert turns(check(model, tmp_path, PICTURE)) == 2  # into the first, out of the last


def test_bytes_that_come_channels_last_are_never_turned(tmp_path: Path) -> None:
    """Immich's newer exports: uint8 pictures, turned inside the graph."""
    nodes = [
        node("Cast", "x", "f", to=1),
        node("Transpose", "f", "t", perm=[0, 3, 1, 2]),
        node("Conv", "t w", "c"),
        node("GlobalAveragePool", "c", "g"),
        node("Flatten", "g", "y"),
    ]
    x = value("x", UINT8, [None, 8, 8, 4])
    model = make_model(nodes, [x], ["y"], {"w": WEIGHTS["w"]})
    feeds = {"x": np.random.default_rng(0).integers(0, 256, (2, 8, 8, 4), np.uint8)}
    program = check(model, tmp_path, feeds)
    assert "Transpose" not in {n.op for n in program.nodes[:-2]}
    assert turns(program) <= 1  # (N, 1, 1, C) → (N, C, 1, 1), which moves nothing


def test_the_turn_of_a_detection_head_merges_with_the_one_out_of_the_layout(tmp_path: Path) -> None:
    nodes = [
        FIRST,
        node("Transpose", "c", "t", perm=[2, 3, 0, 1]),
        node("Reshape", "t s", "y"),
    ]
    model = make_model(nodes, [X], ["y"], {"w": WEIGHTS["w"], "s": ints(-1, 3)})
    program = check(model, tmp_path, {"x": randn(1, 4, 8, 12)})
    assert [n.op for n in program.nodes] == ["Transpose", "Conv", "Transpose", "Reshape"]
    assert turns(program) == 1


def test_what_must_see_channels_first_gets_them(tmp_path: Path) -> None:
    nodes = [FIRST, node("Flatten", "c", "f"), node("MatMul", "f fc", "y")]
    constants = {"w": WEIGHTS["w"], "fc": randn(6 * 96, 5, seed=3)}
    assert turns(check(make_model(nodes, [X], ["y"], constants), tmp_path, PICTURE)) == 2


def test_means_that_leave_another_order_of_axes_stay_right(tmp_path: Path) -> None:
    nodes = [FIRST, node("ReduceMean", "c", "y", axes=[2], keepdims=0)]
    check(make_model(nodes, [X], ["y"], {"w": WEIGHTS["w"]}, 17), tmp_path, PICTURE)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.sampled_from(sorted(BETWEEN)), min_size=2, max_size=4))
def test_any_chain_of_picture_operators_keeps_its_result(tmp_path: Path, kinds: list[str]) -> None:
    nodes, constants, last = [FIRST], dict(WEIGHTS), "c"
    for step, kind in enumerate(kinds):
        if kind in ("one number for each pixel", "upsampling to the size of another") and step:
            continue  # they fit the first picture only
        extra, given_constants = BETWEEN[kind]
        names = {"c": last}
        for proto in extra:
            copy = onnx.NodeProto()
            copy.CopyFrom(proto)
            names |= {"": "", "x": "x"}
            renamed = {n: names.get(n, f"{n}{step}") for n in copy.input}
            copy.input[:] = [renamed[n] for n in proto.input]
            copy.output[:] = [f"{n}{step}" for n in proto.output]
            copy.name = f"{copy.name}{step}"
            nodes.append(copy)
        constants |= {f"{name}{step}": array for name, array in given_constants.items()}
        last = f"z{step}"
    nodes.append(node("Conv", f"{last} v", "y"))
    model = make_model(nodes, [X], ["y"], constants, 17)
    program = lowered(save(model, tmp_path))
    assert_close(run_program(program, PICTURE), run_ort(model, PICTURE), 1e-5)
    assert turns(program) == 2
