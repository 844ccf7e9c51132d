"""The number format `mixed`: right where float16 is not, and with no cast too many."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import onnx
import pytest
from doubles.onnx_models import (
    FLOAT,
    INT32,
    Array,
    make_model,
    node,
    randn,
    run_ort,
    save,
    value,
)
from doubles.towers import LAYERS, LENGTH, PICTURE, VOCABULARY, nllb_like, siglip2_like, vit_l_like

from immich_ml_metal.onnx_graph.families import MOVES, PRODUCTS, SHAPE_ONLY
from immich_ml_metal.onnx_graph.graph import Program
from immich_ml_metal.onnx_graph.reader import read
from immich_ml_metal.onnx_mlx.compiled import MlxGraph, Options
from immich_ml_metal.onnx_mlx.executor import Executor, place
from immich_ml_metal.onnx_mlx.formats import NumberFormat
from immich_ml_metal.onnx_mlx.lower import lower
from immich_ml_metal.onnx_mlx.ops.call import is_floating, to_device

COSINE = 0.9998  # of vectors to float32 on the CPU, the limit of the service
HALF_MAX = 65504
ROWS = 3
CASTS = ("ToHalf", "ToFloat")

# (operands that become narrow, results that become wide): the picture and its patches; in each
# layer both norms and the activation, and what goes into the residual stream twice and into the
# activation once; the last norm and the vector. ReLU is the same in both widths and costs no cast;
# words cost none before the first layer, the mask costs one.
TOWERS: dict[str, tuple[Callable[[], onnx.ModelProto], int, int]] = {
    "SigLIP2-like": (siglip2_like, 1 + 3 * LAYERS + 1, 1 + 3 * LAYERS + 1),
    "ViT-L-like": (vit_l_like, 1 + 3 * LAYERS + 1, 1 + 3 * LAYERS + 1),
    "NLLB-like": (nllb_like, 2 * LAYERS + 1 + 1, 2 * LAYERS + 1),
}


@pytest.fixture(scope="module", params=TOWERS)
def tower(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    make, _, _ = TOWERS[request.param]
    return save(make(), tmp_path_factory.mktemp("tower"), f"{request.param}.onnx")


def feeds_of(path: Path) -> dict[str, Array]:
    rng = np.random.default_rng(7)
    (spec,) = read(path).inputs
    if spec.name == "text":
        words = rng.integers(2, VOCABULARY, (ROWS, LENGTH)).astype(np.int32)
        words[:, 8:] = 1  # padding, which the mask hides
        return {"text": words}
    return {"image": rng.standard_normal((ROWS, *PICTURE[1:])).astype(np.float32)}  # type: ignore[arg-type]


def lowest_cosine(path: Path, number_format: NumberFormat, *, compiled: bool = False) -> float:
    feeds = feeds_of(path)
    (theirs,) = run_ort(path, feeds)
    options = Options(number_format=number_format, max_batch=4, compiled=compiled)
    (ours,) = MlxGraph(path, options).run(feeds)
    lengths = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    return float(((ours * theirs).sum(axis=1) / lengths).min())


def test_the_residual_stream_leaves_float16_and_no_product_does(tower: Path) -> None:
    model = onnx.load(tower)
    kinds = {n.output[0]: n.op_type for n in model.graph.node if n.op_type in ("Add", "MatMul")}
    extra = [onnx.helper.make_empty_tensor_value_info(name) for name in kinds]
    model.graph.output.extend(extra)
    values = dict(zip(kinds, run_ort(model, feeds_of(tower))[1:], strict=True))
    largest = {
        kind: max(
            float(np.abs(v[np.abs(v) < 1e30]).max()) for n, v in values.items() if kinds[n] == kind
        )
        for kind in ("Add", "MatMul")
    }
    assert largest["Add"] > HALF_MAX
    assert largest["MatMul"] < HALF_MAX / 2


def test_float16_fails_on_it(tower: Path) -> None:
    assert not lowest_cosine(tower, NumberFormat.FLOAT16) >= COSINE


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
def test_mixed_keeps_it(tower: Path, compiled: bool) -> None:
    assert lowest_cosine(tower, NumberFormat.MIXED, compiled=compiled) >= 0.99999 > COSINE


def test_it_takes_half_the_memory_of_float32(tower: Path) -> None:
    sizes = [
        MlxGraph(tower, Options(number_format=one)).size_bytes
        for one in (NumberFormat.MIXED, NumberFormat.FLOAT32)
    ]
    assert sizes[0] < 0.52 * sizes[1]


def test_there_are_no_more_casts_than_needed(tower: Path) -> None:
    counts = Counter(n.op for n in lower(read(tower), mixed=True).program.nodes)
    _, narrow, wide = TOWERS[tower.stem]
    assert (counts["ToHalf"], counts["ToFloat"]) == (narrow, wide)


def test_every_product_gets_float16_and_everything_else_float32(tower: Path) -> None:
    assert_widths(lower(read(tower), mixed=True).program, feeds_of(tower))


def assert_widths(program: Program, feeds: dict[str, Array]) -> None:
    """Run it and look at the type of each value that a node is given."""
    place_all = place(program, mx.float32)
    given = {name: to_device(array, mx.float32) for name, array in feeds.items()}
    types = {
        name: v.dtype
        for name, v in (*place_all.items(), *given.items())
        if isinstance(v, mx.array) and is_floating(v)
    }
    for one, outputs in Executor(program, place_all, mx.float32).trace(given):
        floats = {types[name] for name in one.inputs[:3] if name in types}
        if one.op in PRODUCTS:
            assert floats == {mx.float16}, one
        elif one.op not in {*MOVES, *SHAPE_ONLY, *CASTS}:
            assert floats <= {mx.float32}, one
        found = ((n, v) for n, v in outputs.items() if isinstance(v, mx.array))
        types.update({name: v.dtype for name, v in found if is_floating(v)})


def test_no_value_is_turned_twice_or_back(tower: Path) -> None:
    program = lower(read(tower), mixed=True).program
    casts = [n for n in program.nodes if n.op in CASTS]
    turned = {n.outputs[0] for n in casts}
    assert len({(n.op, n.inputs[0]) for n in casts}) == len(casts)
    assert not [n for n in casts if n.inputs[0] in turned]


# -- small graphs ----------------------------------------------------------------------------------


def mixed_counts(model: onnx.ModelProto, folder: Path) -> Counter[str]:
    return Counter(n.op for n in lower(read(save(model, folder)), mixed=True).program.nodes)


def test_pictures_stay_narrow_between_convolutions(tmp_path: Path) -> None:
    nodes = [
        node("Conv", "x w", "c", pads=[1, 1, 1, 1]),
        node("Relu", "c", "r"),
        node("MaxPool", "r", "m", kernel_shape=[2, 2]),
        node("Conv", "m w", "y"),
    ]
    x = value("x", FLOAT, [None, 3, 8, 8])
    model = make_model(nodes, [x], ["y"], {"w": randn(3, 3, 3, 3)})
    counts = mixed_counts(model, tmp_path)
    assert (counts["ToHalf"], counts["ToFloat"]) == (1, 0)


def test_a_value_that_several_products_get_is_turned_once(tmp_path: Path) -> None:
    nodes = [
        node("Sigmoid", "x", "s"),
        *(node("Reshape", f"s shape{i}", f"r{i}") for i in range(3)),
        *(node("MatMul", f"r{i} w", f"p{i}") for i in range(3)),
        node("Sum", "p0 p1 p2", "y"),
    ]
    shapes = {f"shape{i}": np.array([-1, 4], np.int64) for i in range(3)}
    x = value("x", FLOAT, [None, 4])
    model = make_model(nodes, [x], ["y"], {"w": randn(4, 5), **shapes})
    counts = mixed_counts(model, tmp_path)
    assert (counts["ToHalf"], counts["ToFloat"]) == (1, 3)


def test_a_network_without_products_gets_no_casts(tmp_path: Path) -> None:
    nodes = [node("Mul", "x x", "m"), node("Reshape", "m s", "r"), node("Sigmoid", "r", "y")]
    constants = {"s": np.array([-1, 2], np.int64)}
    model = make_model(nodes, [value("x", FLOAT, [None, 4])], ["y"], constants)
    assert not set(CASTS) & set(mixed_counts(model, tmp_path))


def test_a_large_table_of_words_is_kept_narrow_and_read_wide(tmp_path: Path) -> None:
    table = randn(2**14, 64)
    model = make_model(
        [node("Gather", "table text", "g"), node("Mul", "g g", "y")],
        [value("text", INT32, [None, 6])],
        ["y"],
        {"table": table},
    )
    graph = MlxGraph(save(model, tmp_path), Options(number_format=NumberFormat.MIXED))
    assert graph.size_bytes == table.nbytes / 2
    words = np.arange(12, dtype=np.int32).reshape(2, 6)
    np.testing.assert_allclose(graph.run({"text": words})[0], table[words] ** 2, rtol=2e-3)


@pytest.mark.parametrize("guard", ["constant", "computed"])
def test_a_mask_of_the_lowest_number_hides_and_makes_nothing_infinite(
    tmp_path: Path, guard: str
) -> None:
    mask = np.full((1, 1, 4, 4), np.finfo(np.float32).min, np.float32)
    mask[:, :, :3, :2] = 0  # the last row sees nothing, and so the mean of everything
    nodes = [
        node("Transpose", "x", "t", perm=[0, 1, 3, 2]),
        node("MatMul", "x t", "s"),
        node("Mul", "m one", "mask") if guard == "computed" else node("Identity", "fixed", "mask"),
        node("Add", "s mask", "a"),
        node("Softmax", "a", "p", axis=-1),
        node("MatMul", "p x", "y"),
    ]
    inputs = [value("x", FLOAT, [None, 2, 4, 8])]
    feeds = {"x": randn(1, 2, 4, 8)}
    constants = {"one": np.float32(1) * np.ones((), np.float32), "fixed": mask}
    if guard == "computed":
        inputs.append(value("m", FLOAT, [None, 1, 4, 4]))
        feeds["m"] = mask
    used = {name for n in nodes for name in n.input}
    kept = {name: array for name, array in constants.items() if name in used}
    model = make_model(nodes, inputs, ["y"], kept)
    (theirs,) = run_ort(model, feeds)
    graph = MlxGraph(save(model, tmp_path), Options(number_format=NumberFormat.MIXED))
    np.testing.assert_allclose(graph.run(feeds)[0], theirs, atol=5e-3)


def test_a_product_beyond_float16_shows_as_infinite_and_is_not_cut_off(tmp_path: Path) -> None:
    model = make_model(
        [node("MatMul", "x w", "y")],
        [value("x", FLOAT, [None, 4])],
        [value("y", FLOAT, [None, 1])],
        {"w": np.full((4, 1), 300, np.float32)},
    )
    graph = MlxGraph(save(model, tmp_path), Options(number_format=NumberFormat.MIXED))
    assert np.isinf(graph.run({"x": np.full((1, 4), 300, np.float32)})[0]).all()


def test_prepared_weights_give_the_same_numbers(tower: Path) -> None:
    options = Options(number_format=NumberFormat.MIXED, compiled=False, prepared=True)
    feeds = feeds_of(tower)
    first, second = (MlxGraph(tower, options).run(feeds)[0] for _ in range(2))
    assert np.array_equal(first, second)


def test_a_fused_operator_of_known_values_is_computed_all_the_same(tmp_path: Path) -> None:
    """The query of a pooling head is a constant repeated for each row: known when rows are."""
    nodes = [
        node("Shape", "x", "s"),
        node("Expand", "probe s", "p"),
        node("MatMul", "p w", "m"),
        node("Add", "m b", "q"),
        node("Add", "q x", "y"),
    ]
    constants = {"probe": randn(1, 4), "w": randn(4, 4, seed=1), "b": randn(4, seed=2)}
    model = make_model(nodes, [value("x", FLOAT, [None, 4])], ["y"], constants)
    feeds = {"x": randn(2, 4, seed=3)}
    for number_format in (NumberFormat.FLOAT32, NumberFormat.MIXED):
        options = Options(number_format=number_format, max_batch=2)
        (ours,) = MlxGraph(save(model, tmp_path), options).run(feeds)
        np.testing.assert_allclose(ours, run_ort(model, feeds)[0], atol=5e-3)
