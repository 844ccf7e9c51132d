"""The rewritings of all engines on MLX: several texts and pictures at once, each as if alone."""

from pathlib import Path

import numpy as np
import pytest
from doubles.onnx_models import randn, run_ort, save
from doubles.text_towers import LENGTH, WIDTH, causal_mask, picture_tower, text_tower, tokens

from immich_ml_metal.onnx_graph.reader import read
from immich_ml_metal.onnx_mlx.compiled import MlxGraph, Options
from immich_ml_metal.onnx_mlx.executor import infer_shapes
from immich_ml_metal.onnx_mlx.explain import count_flops
from immich_ml_metal.onnx_mlx.lower import lower
from immich_ml_metal.types import FREE_LENGTH

PLAIN = Options(max_batch=4, compiled=False)
TEXTS = [tokens(), tokens(7, 8, 9), tokens(3)]
LONGEST = 4  # words and end token of the longest


def work(path: Path, *skip: str) -> int:
    """Multiplications and additions of one picture."""
    program = lower(read(path), skip=skip).program
    values = infer_shapes(program, {"image": (1, LENGTH - 1, WIDTH)})
    return sum(count_flops(node, values) for node in program.nodes)


@pytest.mark.parametrize("pooling", ["gather", "gather_nd"])
def test_several_texts_are_cut_to_the_longest(tmp_path: Path, pooling: str) -> None:
    path = save(text_tower(pooling, "written", causal_mask()), tmp_path)  # type: ignore[arg-type]
    graph = MlxGraph(path, PLAIN)
    assert graph.max_batch == 4
    assert FREE_LENGTH in graph.metadata
    (vectors,) = graph.run({"text": np.concatenate(TEXTS)[:, :LONGEST]})
    alone = np.concatenate([run_ort(path, {"text": text})[0] for text in TEXTS])
    np.testing.assert_allclose(vectors, alone, atol=2e-6)


def test_the_causal_kernel_is_kept_for_a_mask_that_is_cut(tmp_path: Path) -> None:
    program = lower(read(save(text_tower(mask=causal_mask()), tmp_path))).program
    assert [n.attributes["causal"] for n in program.nodes if n.op == "Sdpa"] == [1, 1]


def test_several_pictures_share_the_short_last_block(tmp_path: Path) -> None:
    path = save(picture_tower(), tmp_path)
    assert lower(read(path)).batched
    assert work(path) < 0.85 * work(path, "rows")
    pictures = randn(3, LENGTH - 1, WIDTH)
    (vectors,) = MlxGraph(path, PLAIN).run({"image": pictures})
    alone = np.concatenate([run_ort(path, {"image": p[None]})[0] for p in pictures])
    np.testing.assert_allclose(vectors, alone, atol=2e-6)


def test_a_rewriting_can_be_left_out(tmp_path: Path) -> None:
    path = save(text_tower(mask=causal_mask()), tmp_path)
    graph = MlxGraph(path, Options(max_batch=4, compiled=False, skip=frozenset({"length"})))
    assert FREE_LENGTH not in graph.metadata
    assert graph.inputs[0].shape == (None, LENGTH)


def test_what_was_left_out_has_a_prepared_form_of_its_own(tmp_path: Path) -> None:
    path = save(text_tower(mask=causal_mask()), tmp_path)
    for skip in (frozenset[str](), frozenset({"length"})):
        graph = MlxGraph(path, Options(compiled=False, prepared=True, skip=skip))
        assert (FREE_LENGTH in graph.metadata) is not skip.issuperset({"length"})
