"""Towers that compute only what is read: the same vectors, and left alone wherever it is not so."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from doubles.onnx_models import Array, randn, run_ort, save
from doubles.text_towers import (
    END,
    LENGTH,
    WIDTH,
    Attention,
    Pooling,
    causal_mask,
    opset23,
    picture_tower,
    text_tower,
    tokens,
)

from immich_ml_metal.onnx_graph.graph import Program
from immich_ml_metal.onnx_graph.reader import read
from immich_ml_metal.onnx_graph.rewriting import REWRITINGS, chosen_rewritings, rewrite
from immich_ml_metal.onnx_graph.shapes import infer_shapes
from immich_ml_metal.onnx_graph.writer import write
from immich_ml_metal.types import FREE_LENGTH

ENDS: list[Pooling] = ["gather", "gather_nd"]
OPERATORS: list[Attention] = ["written", "operator", "causal_operator"]
TEXTS = [tokens(), tokens(3), tokens(7, 8, 9), tokens(*range(1, LENGTH)), tokens(5, padding=END)]


def make_text(pooling: Pooling, attention: Attention, mask: Array | None) -> onnx.ModelProto:
    model = text_tower(pooling, attention, mask)
    return model if attention == "written" else opset23(model)


class Rewritten:
    """A model before and after."""

    def __init__(self, model: onnx.ModelProto, folder: Path, *chosen: str) -> None:
        self.before = save(model, folder)
        self.reasons: list[str] = []
        program, self.applied = rewrite(
            read(self.before),
            chosen,
            infer_shapes,
            lambda name, node, reason: self.reasons.append(f"{name}: {node}: {reason}"),
        )
        self.program: Program = program
        self.after = folder / "rewritten.onnx"
        write(program, self.after)

    def differs(self, name: str, full: Array, short: Array) -> float:
        """Largest difference relative to the largest number of the vector."""
        (before,), (after,) = (
            run_ort(self.before, {name: full}),
            run_ort(self.after, {name: short}),
        )
        assert before.shape == after.shape
        return float(np.abs(before - after).max() / np.abs(before).max())


@pytest.mark.parametrize("pooling", ENDS)
@pytest.mark.parametrize("attention", OPERATORS)
def test_a_causal_text_tower_gives_the_same_vector_without_its_padding(
    tmp_path: Path, pooling: Pooling, attention: Attention
) -> None:
    found = Rewritten(make_text(pooling, attention, causal_mask()), tmp_path, "length", "rows")
    assert found.applied == ("rows", "length"), found.reasons
    assert found.program.metadata[FREE_LENGTH]
    assert found.program.inputs[0].shape == (1, None)
    for text in TEXTS:
        end = int(text.argmax()) + 1
        for length in range(end, LENGTH + 1):
            assert found.differs("text", text, text[:, :length]) < 1e-6


@pytest.mark.parametrize("chosen", ["rows", "length"])
def test_each_rewriting_is_right_alone(tmp_path: Path, chosen: str) -> None:
    found = Rewritten(make_text("gather", "written", causal_mask()), tmp_path, chosen)
    assert found.applied == (chosen,)
    for text in TEXTS:
        short = text[:, : int(text.argmax()) + 1] if chosen == "length" else text
        assert found.differs("text", text, short) < 1e-6


@pytest.mark.parametrize("attention", ["written", "operator"])
def test_a_picture_tower_computes_its_last_block_for_the_class_token_alone(
    tmp_path: Path, attention: Attention
) -> None:
    model = picture_tower(attention)
    model = model if attention == "written" else opset23(model)
    found = Rewritten(model, tmp_path, "rows")
    assert found.applied == ("rows",), found.reasons
    picture = randn(1, LENGTH - 1, WIDTH)
    assert found.differs("image", picture, picture) < 1e-6
    rows = infer_shapes(found.program)
    gemms = [n for n in found.program.nodes if n.op == "Gemm"]
    assert [rows[n.outputs[0]][0] for n in gemms] == [LENGTH, 1]


def test_a_text_tower_that_reads_its_last_token_is_cut_to_it_without_a_mask(tmp_path: Path) -> None:
    found = Rewritten(make_text("last", "written", None), tmp_path, "rows", "length")
    assert found.applied == ("rows",)
    for text in TEXTS:
        assert found.differs("text", text, text) < 1e-6


def soft_mask() -> Array:
    return np.maximum(causal_mask(), np.float32(-2))


def leaky_mask() -> Array:
    mask = causal_mask()
    mask[..., 0, 1] = 0
    return mask


@pytest.mark.parametrize(
    ("pooling", "attention", "mask"),
    [
        ("gather", "written", None),
        ("gather", "operator", None),
        ("gather", "written", soft_mask()),
        ("gather", "written", leaky_mask()),
        ("gather_nd", "operator", leaky_mask()),
        ("gather", "written", causal_mask().swapaxes(-1, -2)),
    ],
    ids=["both ways", "operator", "soft", "leaky", "leaky operator", "backwards"],
)
def test_where_later_tokens_count_the_length_stays(
    tmp_path: Path, pooling: Pooling, attention: Attention, mask: Array | None
) -> None:
    found = Rewritten(make_text(pooling, attention, mask), tmp_path, "length")
    assert found.applied == ()
    assert "no causal mask hides the later ones" in found.reasons[0]
    assert FREE_LENGTH not in found.program.metadata


@pytest.mark.parametrize("mask", [None, causal_mask()])
def test_an_average_over_all_tokens_leaves_the_tower_as_it_is(
    tmp_path: Path, mask: Array | None
) -> None:
    found = Rewritten(make_text("mean", "written", mask), tmp_path, *REWRITINGS)
    assert found.applied == ()
    assert found.reasons


def test_a_value_that_somebody_else_reads_is_computed_whole(tmp_path: Path) -> None:
    model = picture_tower()
    normed = next(n for n in reversed(model.graph.node) if n.op_type == "LayerNormalization")
    model.graph.output.append(onnx.helper.make_tensor_value_info(normed.output[0], 1, None))
    found = Rewritten(model, tmp_path, "rows")
    picture = randn(1, LENGTH - 1, WIDTH)
    before, after = (run_ort(p, {"image": picture}) for p in (found.before, found.after))
    assert after[1].shape == (1, LENGTH, WIDTH)
    np.testing.assert_allclose(after[1], before[1], rtol=1e-5)


def test_a_place_that_is_not_the_end_tokens_is_no_end(tmp_path: Path) -> None:
    model = make_text("gather", "written", causal_mask())
    (shift,) = [t for t in model.graph.initializer if t.dims == [1] and t.data_type == 7]
    shift.CopyFrom(onnx.numpy_helper.from_array(np.array([-1]), shift.name))
    found = Rewritten(model, tmp_path, *REWRITINGS)
    assert found.applied == ()


def test_rewritings_are_chosen_by_name() -> None:
    assert chosen_rewritings(("all",)) == tuple(REWRITINGS)
    assert chosen_rewritings(("off",)) == ()
    assert chosen_rewritings(("length", "rows")) == ("rows", "length")
