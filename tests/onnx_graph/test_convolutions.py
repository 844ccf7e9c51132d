"""Convolution networks with less to do: GELU in one operator, upscaling by products."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from doubles.onnx_models import FLOAT, randn, run_ort, save, value
from doubles.towers import Tower

from immich_ml_metal.onnx_graph.casts import fold_casts
from immich_ml_metal.onnx_graph.gelu import GELU
from immich_ml_metal.onnx_graph.graph import Program
from immich_ml_metal.onnx_graph.reader import read
from immich_ml_metal.onnx_graph.rewriting import rewrite
from immich_ml_metal.onnx_graph.shapes import infer_shapes
from immich_ml_metal.onnx_graph.writer import write

ROUNDED = 1.4140625  # the root of two in half precision
CHANNELS = 6
PICTURE = randn(1, CHANNELS, 8, 12)


class Network(Tower):
    """A convolution network being written; its result is `y`."""

    def conv(self, x: str, out: int, *, into: int = CHANNELS) -> str:
        return self.add("Conv", x, self.weights(out, into, 1, 1, scale=0.5), self.weights(out))

    def gelu(self, x: str, root: float) -> str:
        inner = self.add("Erf", self.add("Div", x, self.const(np.float32(root))))
        shifted = self.add("Add", inner, self.const(np.float32(1)))
        return self.add("Mul", self.add("Mul", x, shifted), self.const(np.float32(0.5)))

    def doubled(self, x: str, into: int, out: int, **attributes: object) -> str:
        weights = self.weights(into, out, 2, 2, scale=0.3)
        bigger = self.add("ConvTranspose", x, weights, **{"strides": [2, 2], **attributes})
        bias = self.const(self.random.standard_normal((1, out, 1, 1)).astype(np.float32))
        return self.add("Add", bigger, bias)

    def finish(self, *more: str) -> onnx.ModelProto:
        self.nodes[-1].output[0] = "y"
        model = self.model("x", FLOAT, [1, CHANNELS, 8, 12])
        del model.graph.output[:]
        model.graph.output.extend(value(name, FLOAT, None) for name in ("y", *more))
        return model


def apply(model: onnx.ModelProto, folder: Path, name: str) -> tuple[Program, float, list[str]]:
    """The rewritten program, its largest difference, and why nodes were left alone."""
    reasons: list[str] = []
    path = save(model, folder)
    program, _ = rewrite(
        fold_casts(read(path)), [name], infer_shapes, lambda _, __, why: reasons.append(why)
    )
    write(program, folder / "after.onnx")
    pairs = zip(*(run_ort(p, {"x": PICTURE}) for p in (path, folder / "after.onnx")), strict=True)
    return program, max(float(np.abs(a - b).max()) for a, b in pairs), reasons


def operators(program: Program) -> Counter[str]:
    return Counter(node.op for node in program.nodes)


def test_a_gelu_around_a_rounded_root_becomes_one_operator(tmp_path: Path) -> None:
    net = Network()
    net.conv(net.gelu(net.conv("x", CHANNELS), ROUNDED), 3)
    program, difference, _ = apply(net.finish(), tmp_path, "gelu")
    assert operators(program) == {"Conv": 2, GELU: 1}
    assert difference < 2e-6


def test_the_root_of_the_file_is_kept(tmp_path: Path) -> None:
    net = Network()
    net.conv(net.gelu(net.conv("x", CHANNELS), ROUNDED), 3)
    exact = Network()
    exact.conv(exact.gelu(exact.conv("x", CHANNELS), 2**0.5), 3)
    (rounded,), (other,) = (
        run_ort(save(n.finish(), tmp_path), {"x": PICTURE}) for n in (net, exact)
    )
    assert np.abs(rounded - other).max() > 1e-5  # so the test above would notice


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda n: n.conv(n.gelu(n.conv("x", CHANNELS), 2**0.5), 3), "the runtime fuses it"),
        (lambda n: n.conv(n.gelu(n.conv("x", CHANNELS), 1.5), 3), "not by the root of two"),
        (lambda n: n.conv(n.gelu(n.add("Relu", "x"), ROUNDED), 3), "not from Conv"),
        (lambda n: n.add("Relu", n.gelu(n.conv("x", CHANNELS), ROUNDED)), "not to a Conv"),
    ],
)
def test_a_gelu_that_cannot_be_folded_stays(tmp_path: Path, build: object, reason: str) -> None:
    net = Network()
    build(net)  # type: ignore[operator]
    program, difference, reasons = apply(net.finish(), tmp_path, "gelu")
    assert operators(program)["Erf"] == 1
    assert difference == 0
    assert reason in reasons[0]


def test_weights_that_another_convolution_shares_are_not_spoilt(tmp_path: Path) -> None:
    net = Network()
    shared = net.weights(CHANNELS, CHANNELS, 1, 1)
    first = net.add("Conv", "x", shared)
    behind = net.add("Conv", net.gelu(first, ROUNDED), shared)
    net.add("Conv", behind, shared)
    _, difference, _ = apply(net.finish(), tmp_path, "gelu")
    assert difference < 5e-6


def test_doubling_is_done_by_products(tmp_path: Path) -> None:
    net = Network()
    net.add("Relu", net.doubled("x", CHANNELS, 5))
    program, difference, _ = apply(net.finish(), tmp_path, "upscaling")
    assert operators(program) == {"Conv": 1, "Relu": 1, "DepthToSpace": 1}
    assert difference < 1e-6


def test_two_doublings_move_the_pixels_once(tmp_path: Path) -> None:
    net = Network()
    wide = net.add("Relu", net.doubled("x", CHANNELS, 5))
    net.add("Sigmoid", net.doubled(wide, 5, 1))
    program, difference, _ = apply(net.finish(), tmp_path, "upscaling")
    assert operators(program) == {"Conv": 2, "Relu": 1, "Sigmoid": 1, "DepthToSpace": 1}
    assert difference < 1e-6


def test_a_doubling_between_that_somebody_else_reads_stays(tmp_path: Path) -> None:
    net = Network()
    wide = net.add("Relu", net.doubled("x", CHANNELS, 5))
    net.add("Sigmoid", net.doubled(wide, 5, 1))
    program, difference, _ = apply(net.finish(wide), tmp_path, "upscaling")
    assert operators(program)["DepthToSpace"] == 2
    assert difference < 1e-6


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ({"strides": [1, 1]}, "stride"),
        ({"pads": [1, 1, 1, 1]}, "pads"),
        ({"output_padding": [1, 1]}, "output_padding"),
        ({"auto_pad": "SAME_UPPER"}, "pads by itself"),
    ],
)
def test_other_transposed_convolutions_stay(
    tmp_path: Path, attributes: dict[str, object], reason: str
) -> None:
    net = Network()
    net.add("Relu", net.doubled("x", CHANNELS, 5, **attributes))
    program, difference, reasons = apply(net.finish(), tmp_path, "upscaling")
    assert operators(program)["ConvTranspose"] == 1
    assert difference == 0
    assert reason in reasons[0]


def test_a_bias_of_another_shape_is_added_behind(tmp_path: Path) -> None:
    net = Network()
    weights = net.weights(CHANNELS, 5, 2, 2)
    bigger = net.add("ConvTranspose", "x", weights, strides=[2, 2])
    net.add("Add", bigger, net.const(randn(1, 5, 16, 24)))
    program, difference, _ = apply(net.finish(), tmp_path, "upscaling")
    assert operators(program)["Add"] == 1
    assert difference < 1e-6


def test_casts_of_constants_are_done_once(tmp_path: Path) -> None:
    net = Network()
    half = net.const(randn(3, CHANNELS, 1, 1).astype(np.float16))
    net.add("Conv", "x", net.add("Cast", half, to=FLOAT))
    program = fold_casts(read(save(net.finish(), tmp_path)))
    assert operators(program) == {"Conv": 1}
