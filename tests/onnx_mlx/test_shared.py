"""Full-size graphs of ../shared against ONNX Runtime: every export style and family of Immich.

The weights are random (only their size and range are real), except in `models/real`. Slow without a
fast BLAS under MLX (see docs/performance.md), never wrong.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from doubles.onnx_models import Array, run_ort
from doubles.shared_models import find_graph
from onnx import TensorProto, numpy_helper

from immich_ml_metal.onnx_graph.reader import read
from immich_ml_metal.onnx_mlx.compare import compare_nodes, difference, guess_shapes, random_feeds
from immich_ml_metal.onnx_mlx.compiled import MlxGraph, Options
from immich_ml_metal.onnx_mlx.formats import NumberFormat
from immich_ml_metal.onnx_mlx.lower import lower

pytestmark = [pytest.mark.shared, pytest.mark.timeout(600)]

PLAIN = Options(max_batch=8, compiled=False)
COSINE, RELATIVE = 0.999999, 1e-4  # fp32 against ONNX Runtime
COSINE_HALF = 0.9995  # fp16
COSINE_MIXED = 0.9998  # the limit of the service for vectors

# graph → fused attentions (one for each layer, and one in a pooling head)
TOWERS = {
    "ViT-B-32.ts19.visual": 12,
    "ViT-B-32.ts19.textual": 12,
    "ViT-B-32.dynamo19.visual": 12,
    "ViT-B-32.dynamo19.textual": 12,
    "ViT-B-32.dynamo23.visual": 12,
    "ViT-B-32.dynamo23.textual": 12,
    "SigLIP-B-16.depth2.visual": 3,
    "SigLIP2-SO400M.depth2.visual": 3,
    "SigLIP.depth2.textual": 2,
    "XLM-R.depth2.textual": 2,
    "RN50.visual": 1,
}
# convolution network → turns that the layout needs: into the first convolution, out of the last
BACKBONES = {
    "RN50.visual": 2,
    "arcface-iresnet50": 2,
    "scrfd-10g-like": 1,  # out of it, each head's own Transpose does the turn
    "mobilefacenet_512": 2,
    "scrfd_500m": 1,
    "ppocrv6_tiny_det": 2,
    "PP-OCRv6_det_small": 2,
}
SHAPES = {
    "scrfd-10g-like": {"input.1": (1, 3, 320, 320)},
    "scrfd_500m": {"input.1": (1, 3, 320, 320)},
    "ppocrv6_tiny_rec": {"x": (2, 3, 48, 320)},
    "ppocrv6_tiny_det": {"x": (1, 3, 160, 224)},
    "PP-OCRv6_rec_small": {"x": (2, 3, 48, 320)},
    "PP-OCRv6_det_small": {"x": (1, 3, 160, 224)},
    "ch_ppocr_mobile_v2.0_cls_mobile": {"x": (2, 3, 48, 192)},
}
SMALL = (
    "XLM-R.depth2.textual",
    "mobilefacenet_512",
    "scrfd_500m",
    "ch_ppocr_mobile_v2.0_cls_mobile",
)


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """A folder for graphs of hundreds of megabytes, emptied at once."""
    yield tmp_path
    for file in tmp_path.rglob("*.onnx"):
        file.unlink()


def feeds_for(path: Path, rows: int = 1) -> dict[str, Array]:
    program = read(path)
    shapes = guess_shapes(program, SHAPES.get(path.stem))
    feeds = random_feeds(program, {n: (s[0] * rows, *s[1:]) for n, s in shapes.items()})
    if path.stem.startswith("XLM-R"):
        feeds["text"][:, 40:] = 1  # padding, which the network masks
    return feeds


GRAPHS = sorted(
    {*TOWERS, *BACKBONES, "ch_ppocr_mobile_v2.0_cls_mobile"}
    - {
        "ppocrv6_tiny_det",
        "PP-OCRv6_det_small",  # below, where their last operator is looked at
    }
)


@pytest.mark.parametrize("name", GRAPHS)
def test_every_output_is_that_of_onnx_runtime(name: str, scratch: Path) -> None:
    path = find_graph(name, scratch)
    feeds = feeds_for(path)
    graph = MlxGraph(path, PLAIN)
    for spec, ours, theirs in zip(
        graph.outputs, graph.run(feeds), run_ort(path, feeds), strict=True
    ):
        found = difference(spec.name, "", ours, theirs)
        assert found.cosine >= COSINE, found
        assert found.relative <= RELATIVE, found


@pytest.mark.parametrize("name", TOWERS)
def test_every_attention_is_fused_and_the_batch_is_free(name: str, scratch: Path) -> None:
    lowered = lower(read(find_graph(name, scratch)))
    counts = Counter(node.op for node in lowered.program.nodes)
    assert counts["Sdpa"] + counts["Attention"] == TOWERS[name]
    assert counts["Softmax"] == 0
    assert lowered.batched, lowered.reason


@pytest.mark.parametrize("name", BACKBONES)
def test_no_picture_is_turned_inside_a_backbone(name: str, scratch: Path) -> None:
    nodes = lower(read(find_graph(name, scratch))).program.nodes
    turns = [at for at, node in enumerate(nodes) if node.attributes.get("layout")]
    assert len(turns) == BACKBONES[name]
    convolutions = [at for at, node in enumerate(nodes) if node.op.startswith("Conv")]
    inside = range(convolutions[0], convolutions[-1])
    assert not [at for at in turns if at in inside]


@pytest.mark.parametrize(
    "name",
    [
        "XLM-R.depth2.textual",
        "SigLIP-B-16.depth2.visual",
        "ViT-B-32.ts19.textual",
        "mobilefacenet_512",
    ],
)
def test_one_three_and_eight_rows_give_the_same_vectors(name: str, scratch: Path) -> None:
    path = find_graph(name, scratch)
    graph = MlxGraph(path, PLAIN)
    feeds = feeds_for(path, rows=8)
    (eight,) = graph.run(feeds)
    (three,) = graph.run({n: f[:3] for n, f in feeds.items()})
    (last,) = graph.run({n: f[7:] for n, f in feeds.items()})
    assert difference(name, "", three, eight[:3]).relative <= 1e-5
    assert difference(name, "", last, eight[7:]).relative <= 1e-5


@pytest.mark.parametrize("name", SMALL)
def test_half_precision_stays_close(name: str, scratch: Path) -> None:
    path = find_graph(name, scratch)
    feeds = feeds_for(path)
    half = MlxGraph(path, Options(number_format=NumberFormat.FLOAT16, compiled=False))
    for spec, ours, theirs in zip(half.outputs, half.run(feeds), run_ort(path, feeds), strict=True):
        assert difference(spec.name, "", ours, theirs).cosine >= COSINE_HALF


@pytest.mark.parametrize("name", TOWERS)
def test_mixed_numbers_keep_every_tower_within_the_services_limit(name: str, scratch: Path) -> None:
    path = find_graph(name, scratch)
    feeds = feeds_for(path)
    mixed = MlxGraph(path, Options(number_format=NumberFormat.MIXED, compiled=False))
    for spec, ours, theirs in zip(
        mixed.outputs, mixed.run(feeds), run_ort(path, feeds), strict=True
    ):
        assert difference(spec.name, "", ours, theirs).cosine >= COSINE_MIXED


# -- PP-OCR ---------------------------------------------------------------------------------------


def widened(path: Path, folder: Path) -> Path:
    """The same file with every float16 in it made float32.

    The tiny models store and cast to float16. ONNX Runtime rounds each value accordingly, and with
    other optimisations differently (5e-4 between two of its own runs); MLX in float32 does not
    round. On the widened file both must agree.
    """
    model = onnx.load(path)
    holders = [*model.graph.initializer]
    for node in model.graph.node:
        for attribute in node.attribute:
            holders += [attribute.t] if attribute.type == onnx.AttributeProto.TENSOR else []
            if attribute.name == "to" and attribute.i == TensorProto.FLOAT16:
                attribute.i = TensorProto.FLOAT
    for tensor in holders:
        if tensor.data_type == TensorProto.FLOAT16:
            wide = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(wide, tensor.name))
    del model.graph.value_info[:]
    onnx.save(model, folder / path.name)
    return folder / path.name


READERS = {
    "ppocrv6_tiny_det": "Sigmoid",
    "ppocrv6_tiny_rec": "Softmax",
    "PP-OCRv6_det_small": "Sigmoid",
    "PP-OCRv6_rec_small": "Softmax",
}


@pytest.mark.parametrize("name", READERS)
def test_text_networks_agree_up_to_their_last_operator(name: str, scratch: Path) -> None:
    """Each value before the final Sigmoid or Softmax.

    After it, two things that are not ours count: ONNX Runtime's Sigmoid is off by up to 1e-7, which
    is all of a small probability; and a Softmax turns a relative 4e-6 of a logit of 20 into 1e-4.
    """
    path = widened(find_graph(name, scratch), scratch)
    last = None
    for found in compare_nodes(path, NumberFormat.FLOAT32, SHAPES[name]):
        if found.operator == READERS[name] and "fetch" in found.name:
            assert found.cosine >= 0.9999
        else:
            assert found.relative <= RELATIVE, found
            last = found
    assert last is not None
    assert last.cosine >= COSINE


def test_the_detectors_own_last_step_is_nearer_to_the_truth_than_onnx_runtimes(
    scratch: Path,
) -> None:
    path = widened(find_graph("ppocrv6_tiny_det", scratch), scratch)
    model = onnx.load(path)
    (last,) = [n for n in model.graph.node if n.op_type == "Sigmoid"]
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(last.input[0]))
    feeds = feeds_for(find_graph("ppocrv6_tiny_det", scratch))
    theirs, logits = run_ort(model, feeds)
    exact = 1 / (1 + np.exp(-logits.astype(np.float64)))
    (ours,) = MlxGraph(path, PLAIN).run(feeds)
    off, off_there = (np.abs(found - exact) / exact for found in (ours, theirs))
    assert np.median(off) <= 1e-5
    assert np.median(off_there) > 1e-2  # most of the map is background, far below 1e-6


@pytest.mark.parametrize("name", ["ppocrv6_tiny_rec", "PP-OCRv6_rec_small"])
def test_the_best_character_of_every_step_is_the_same(name: str, scratch: Path) -> None:
    path = find_graph(name, scratch)
    feeds = feeds_for(path)
    (ours,), (theirs,) = MlxGraph(path, PLAIN).run(feeds), run_ort(path, feeds)
    assert np.array_equal(ours.argmax(-1), theirs.argmax(-1))
