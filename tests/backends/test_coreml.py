"""The Core ML engine, with the CPU provider playing Core ML: shapes, checks, refusals, caches."""

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from immich_ml_metal.backends.coreml.engine import REFUSED, CoreMLEngine, create_coreml
from immich_ml_metal.backends.coreml.graph import (
    CoreMLGraph,
    Refusal,
    Setup,
    ShapeReport,
    compiled_form,
)
from immich_ml_metal.backends.coreml.session import (
    PROVIDER,
    Session,
    provider_options,
    provider_share,
)
from immich_ml_metal.backends.coreml.shapes import cut, read_pinned
from immich_ml_metal.backends.ort.session import OrtGraph, session_options
from immich_ml_metal.errors import InferenceError, LoadFailed
from immich_ml_metal.settings import Settings
from immich_ml_metal.types import ModelFiles, ModelKey, Part, Task

SIDE = 8
KEY = ModelKey(Task.FACES, Part.RECOGNITION, "buffalo_l")


@pytest.fixture(autouse=True, scope="module")
def _first_session_on_a_thread_that_ends(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The first session of a process makes its thread take subnormals for zero, for good."""
    with ThreadPoolExecutor(1) as thread:
        thread.submit(reference, save_model(tmp_path_factory.mktemp("first"))).result()


class Assignment:
    """One group of nodes of ONNX Runtime's assignment report, under another provider's name."""

    def __init__(self, ep_name: str, count: int) -> None:
        self.ep_name = ep_name
        self._count = count

    def get_nodes(self) -> list[object]:
        return [object()] * self._count


class Accelerator:
    """A CPU session that says it is Core ML's; `share` of ten nodes counts as accelerated."""

    def __init__(self, model: bytes, share: float = 1.0) -> None:
        options = session_options(1)
        self._session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self._share = share
        self.ran: list[tuple[int, ...]] = []

    def run(self, names: Any, feeds: dict[str, Any]) -> Any:
        self.ran += [value.shape for value in feeds.values()]
        return self._session.run(names, feeds)

    def get_provider_graph_assignment_info(self) -> list[Assignment]:
        taken = round(10 * self._share)
        return [Assignment(PROVIDER, taken), Assignment("CPUExecutionProvider", 10 - taken)]


class Factory:
    """Opens accelerators and keeps what it was asked for."""

    def __init__(
        self, change: Callable[[onnx.ModelProto], None] | None = None, share: float = 1.0
    ) -> None:
        self._change = change
        self._share = share
        self.opened: list[Accelerator] = []
        self.options: list[Mapping[str, str]] = []

    def __call__(self, model: bytes, options: Mapping[str, str]) -> Session:
        if self._change is not None:
            proto = onnx.load_from_string(model)
            self._change(proto)
            model = proto.SerializeToString()
        self.options.append(options)
        self.opened.append(Accelerator(model, self._share))
        return self.opened[-1]


def save_model(folder: Path, *, batch: int | str = 1, side: int | str = SIDE) -> Path:
    """A tiny recogniser: convolution, pooling over the picture, a matrix to 512."""
    rng = np.random.default_rng(7)
    conv = rng.standard_normal((4, 3, 3, 3)).astype(np.float32)
    dense = rng.standard_normal((4, 512)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "conv"], ["c"], pads=[1, 1, 1, 1]),
            helper.make_node("GlobalMaxPool", ["c"], ["p"]),
            helper.make_node("Flatten", ["p"], ["f"]),
            helper.make_node("MatMul", ["f", "dense"], ["y"]),
        ],
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 3, side, side])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 512])],
        [numpy_helper.from_array(conv, "conv"), numpy_helper.from_array(dense, "dense")],
    )
    opset = helper.make_opsetid("", 17)
    path = folder / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=9), path)
    return path


def reference(path: Path) -> OrtGraph:
    return OrtGraph(path, options=session_options(1))


def open_graph(
    path: Path,
    factory: Factory,
    batches: tuple[int, ...] = (1, 4),
    reports: list[ShapeReport] | None = None,
    number_format: str = "float32",
) -> CoreMLGraph:
    setup = Setup(True, number_format, make_session=factory, environment="ort-test")
    graph = CoreMLGraph(
        compiled_form(path, setup),
        reference(path),
        setup,
        name="tiny",
        batches=batches,
        on_report=(reports if reports is not None else []).append,
    )
    graph.keep_compiled()
    graph.open_fixed_shapes()
    return graph


def pictures(rows: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(rows).uniform(-1, 1, (rows, 3, SIDE, SIDE)).astype(np.float32)


# -- shapes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "sizes"), [(1, [1]), (2, [4]), (3, [4]), (4, [4]), (5, [4, 1]), (9, [4, 4, 1])]
)
def test_rows_are_cut_into_the_compiled_sizes(rows: int, sizes: list[int]) -> None:
    assert [size for _, _, size in cut(rows, (1, 4))] == sizes


@given(rows=st.integers(1, 50), sizes=st.sets(st.integers(1, 9), min_size=1))
def test_every_row_is_run_once_and_in_order(rows: int, sizes: set[int]) -> None:
    sizes = sizes | {1}
    pieces = list(cut(rows, sorted(sizes)))
    covered = [row for start, stop, _ in pieces for row in range(start, stop)]
    assert covered == list(range(rows))
    assert all(stop - start <= size in sizes for start, stop, size in pieces)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7])
def test_any_number_of_rows_gives_what_the_cpu_gives_row_by_row(tmp_path: Path, rows: int) -> None:
    path = save_model(tmp_path)
    graph, single = open_graph(path, Factory()), reference(path)
    feeds = pictures(rows)
    [ours] = graph.run({"x": feeds})
    expected = np.concatenate([single.run({"x": feeds[row : row + 1]})[0] for row in range(rows)])
    assert ours == pytest.approx(expected, abs=1e-4)


def test_only_the_fixed_batches_are_ever_compiled(tmp_path: Path) -> None:
    factory = Factory()
    graph = open_graph(save_model(tmp_path), factory)
    for rows in (1, 2, 3, 4, 5, 6):
        graph.run({"x": pictures(rows)})
    shapes = {shape for session in factory.opened for shape in session.ran}
    assert shapes == {(1, 3, SIDE, SIDE), (4, 3, SIDE, SIDE)}
    assert len(factory.opened) == 2
    assert graph.max_batch == 4
    assert graph.fixed_shapes


def test_the_file_on_disk_is_never_changed(tmp_path: Path) -> None:
    path = save_model(tmp_path)
    before = path.read_bytes()
    open_graph(path, Factory()).run({"x": pictures(3)})
    assert path.read_bytes() == before


def test_a_shape_that_the_file_leaves_open_is_compiled_when_it_is_first_seen(
    tmp_path: Path,
) -> None:
    factory = Factory()
    graph = open_graph(save_model(tmp_path, batch="n", side="s"), factory, batches=(1,))
    assert factory.opened == []
    for side in (8, 16, 8):
        graph.run({"x": np.ones((1, 3, side, side), np.float32)})
    assert len(factory.opened) == 2


def test_pinning_to_another_number_of_dimensions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LoadFailed, match="has 4 dimensions, not 2"):
        read_pinned(save_model(tmp_path), (("x", (1, 3)),))


def test_a_torn_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"\xff not onnx")
    with pytest.raises(LoadFailed, match="cannot be pinned"):
        read_pinned(path, ())


# -- checks ----------------------------------------------------------------------------------------


def test_a_graph_of_which_core_ml_takes_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="not one node"):
        open_graph(save_model(tmp_path), Factory(share=0))


def test_the_share_of_each_shape_is_reported(tmp_path: Path) -> None:
    reports: list[ShapeReport] = []
    open_graph(save_model(tmp_path), Factory(share=0.7), reports=reports)
    assert [(report.shape, report.share) for report in reports] == [
        ("1x3x8x8", 0.7),
        ("4x3x8x8", 0.7),
    ]


def test_the_share_of_nodes_is_read_from_onnx_runtime_itself(tmp_path: Path) -> None:
    options = session_options(1)
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    cpu = "CPUExecutionProvider"
    session = ort.InferenceSession(save_model(tmp_path), options, providers=[cpu])
    assert provider_share(session, cpu) == 1.0
    assert provider_share(session, PROVIDER) == 0.0


# -- compiled forms --------------------------------------------------------------------------------


def compiled_folders(path: Path) -> list[str]:
    return sorted(folder.name for folder in (path.parent / "coreml").iterdir())


def test_compiled_forms_are_kept_by_weights_runtime_units_and_shape(tmp_path: Path) -> None:
    path, factory = save_model(tmp_path), Factory()
    open_graph(path, factory)
    [form] = compiled_folders(path)
    assert form.startswith("model-")
    assert "-ort-test-" in form
    assert form.endswith("-all-float32")
    folders = [Path(options["ModelCacheDirectory"]) for options in factory.options]
    assert [folder.relative_to(tmp_path / "coreml" / form).as_posix() for folder in folders] == [
        "1x3x8x8",
        "4x3x8x8",
    ]
    assert all(folder.is_dir() for folder in folders)


def test_forms_of_replaced_weights_are_removed(tmp_path: Path) -> None:
    path = save_model(tmp_path)
    open_graph(path, Factory())
    old = compiled_folders(path)
    path.write_bytes(path.read_bytes() + b"\x72\x02hi")  # one more field: other bytes, same graph
    open_graph(path, Factory())
    assert len(compiled_folders(path)) == 1
    assert compiled_folders(path) != old


def test_what_finder_leaves_in_the_folder_does_not_cost_the_compiled_forms(tmp_path: Path) -> None:
    path = save_model(tmp_path)
    open_graph(path, Factory())
    compiled = tmp_path / "coreml" / compiled_folders(path)[0] / "1x3x8x8" / "kept"
    compiled.write_text("compiled by Core ML in minutes")
    (tmp_path / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    open_graph(path, Factory())
    assert compiled.exists()


def test_opening_a_graph_closes_nothing_that_is_its_callers(tmp_path: Path) -> None:
    path = save_model(tmp_path)
    setup = Setup(use_ane=True, make_session=Factory(), environment="ort-test")
    single = reference(path)
    graph = CoreMLGraph(
        compiled_form(path, setup), single, setup, name="tiny", batches=(1,), on_report=print
    )
    assert not (tmp_path / "coreml").exists()
    graph.keep_compiled()
    assert graph.open_fixed_shapes()
    assert single.run({"x": pictures(1)})[0].shape == (1, 512)


def test_the_half_form_is_made_once_and_kept_beside_the_whole_one(tmp_path: Path) -> None:
    path = save_model(tmp_path)
    factory = Factory()
    open_graph(path, factory)
    half = open_graph(path, factory, number_format="float16")
    assert [name.rpartition("-")[2] for name in compiled_folders(path)] == ["float16", "float32"]
    kept = next((tmp_path / "coreml").glob("*-float16")) / "half.onnx"
    before = kept.stat().st_mtime_ns
    open_graph(path, factory, number_format="float16")
    assert kept.stat().st_mtime_ns == before
    feeds = pictures(3)
    single = reference(path)
    expected = np.concatenate([single.run({"x": feeds[row : row + 1]})[0] for row in range(3)])
    (ours,) = half.run({"x": feeds})
    assert ours.dtype == np.float32
    assert ours == pytest.approx(expected, rel=5e-3, abs=5e-2)
    assert not np.array_equal(ours, expected)


@pytest.mark.parametrize("number_format", ["float32", "float16"])
def test_pictures_of_bytes_are_given_to_core_ml_as_floats(
    tmp_path: Path, number_format: str
) -> None:
    path = save_model(tmp_path)
    model = onnx.load(path)
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8
    model.graph.node[0].input[0] = "floats"
    model.graph.node.insert(0, helper.make_node("Cast", ["x"], ["floats"], to=TensorProto.FLOAT))
    onnx.save(model, path)
    reports: list[ShapeReport] = []
    graph = open_graph(path, Factory(), reports=reports, number_format=number_format)
    feeds = np.random.default_rng(0).integers(0, 256, (1, 3, SIDE, SIDE)).astype(np.uint8)
    assert graph.run({"x": feeds})[0] == pytest.approx(
        reference(path).run({"x": feeds})[0], rel=2e-2, abs=2
    )
    assert [report.adapted for report in reports] == [("bytes",), ("bytes",)]
    assert {report.number_format for report in reports} == {number_format}


def test_other_passes_compile_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_model(tmp_path)
    open_graph(path, Factory())
    before = compiled_folders(path)
    monkeypatch.setattr("immich_ml_metal.backends.coreml.graph._passes_digest", lambda: "other")
    open_graph(path, Factory())
    assert compiled_folders(path) != before
    assert len(compiled_folders(path)) == 1


# Every key that ONNX Runtime 1.32's macOS wheel knows; another one would silently mean the CPU.
PROVIDER_KEYS = {
    "ModelFormat",
    "MLComputeUnits",
    "RequireStaticInputShapes",
    "EnableOnSubgraphs",
    "ModelCacheDirectory",
    "SpecializationStrategy",
    "AllowLowPrecisionAccumulationOnGPU",
    "ProfileComputePlan",
}


def test_the_options_are_those_of_the_provider_and_follow_the_ane_setting() -> None:
    options = provider_options(use_ane=True, cache=Path("c"))
    assert options["MLComputeUnits"] == "ALL"
    assert options["ModelFormat"] == "MLProgram"
    assert options["RequireStaticInputShapes"] == "1"
    assert set(options) <= PROVIDER_KEYS
    assert provider_options(use_ane=False, cache=Path("c"))["MLComputeUnits"] == "CPUAndGPU"


# -- the engine ------------------------------------------------------------------------------------


def engine(
    factory: Factory, *, is_explicit: bool = False, told: list[str] | None = None
) -> CoreMLEngine:
    return CoreMLEngine(
        Settings(intra_op_threads=1),
        Setup(use_ane=True, make_session=factory, environment="ort-test"),
        is_explicit=is_explicit,
        on_fallback=(told if told is not None else []).append,
    )


def files(folder: Path) -> ModelFiles:
    return ModelFiles(save_model(folder, side=112), folder, folder)


def test_faces_are_recognised_in_batches_of_four(tmp_path: Path) -> None:
    factory = Factory()
    coreml = engine(factory)
    model = coreml.load(KEY, files(tmp_path))
    blobs = [np.full((3, 112, 112), value, np.float32) for value in (0.1, -0.4, 0.9)]
    vectors = model.infer(blobs)
    assert model.max_batch == 4
    assert [vector.shape for vector in vectors] == [(512,)] * 3
    assert factory.opened[-1].ran[-1] == (4, 3, 112, 112)
    [single, four] = coreml.describe()["opened"]
    assert (single["shape"], four["shape"]) == ("1x3x112x112", "4x3x112x112")
    assert (single["share"], single["model"]) == (1.0, "buffalo_l/recognition")
    model.close()


def test_the_engine_opens_a_model_in_either_format_and_tells_them_apart(tmp_path: Path) -> None:
    coreml, model_files = engine(Factory()), files(tmp_path)
    assert coreml.number_formats == {"float32", "float16"}
    coreml.load(KEY, model_files).close()
    coreml.load(KEY, model_files, "float16").close()
    told = [(one["number_format"], one["shape"]) for one in coreml.describe()["opened"]]
    assert told == [
        (number_format, f"{batch}x3x112x112")
        for number_format in ("float32", "float16")
        for batch in (1, 4)
    ]


def test_a_format_that_is_refused_leaves_the_other(tmp_path: Path) -> None:
    def only_half(model: onnx.ModelProto) -> None:
        if any(t.data_type == TensorProto.FLOAT16 for t in model.graph.initializer):
            raise LoadFailed("no float16 here")

    coreml, model_files = engine(Factory(only_half)), files(tmp_path)
    coreml.load(KEY, model_files, "float16").close()
    assert "no float16 here" in next(iter(coreml.describe()["refused"].values()))
    coreml.load(KEY, model_files).close()
    assert {one["number_format"] for one in coreml.describe()["opened"]} == {"float32"}


@pytest.mark.parametrize(("use_ane", "units"), [(True, "ALL"), (False, "CPUAndGPU")])
def test_the_neural_engine_setting_reaches_the_sessions(
    tmp_path: Path, use_ane: bool, units: str
) -> None:
    factory = Factory()
    coreml = create_coreml(
        Settings(use_ane=use_ane),
        is_explicit=True,
        on_fallback=lambda reason: None,
        make_session=factory,
    )
    coreml.load(KEY, files(tmp_path))
    assert {options["MLComputeUnits"] for options in factory.options} == {units}


def test_a_refused_model_is_answered_by_the_cpu_and_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[str] = []
    factory, model_files = Factory(share=0), files(tmp_path)
    coreml = engine(factory, told=told)
    with caplog.at_level(logging.WARNING):
        first = coreml.load(KEY, model_files)
        coreml.load(KEY, model_files)
    expected = reference(model_files.graph).run({"x": np.ones((1, 3, 112, 112), np.float32)})[0]
    assert first.infer([np.ones((3, 112, 112), np.float32)])[0] == pytest.approx(expected[0])
    assert told == [REFUSED]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    described = coreml.describe()
    assert list(described["refused"]) == ["buffalo_l/recognition"]
    assert "not one node" in described["refused"]["buffalo_l/recognition"]
    assert len(factory.opened) == 1


def test_a_refused_model_is_an_error_where_core_ml_was_asked_for(tmp_path: Path) -> None:
    with pytest.raises(LoadFailed, match=r"buffalo_l/recognition: .* not one node"):
        engine(Factory(share=0), is_explicit=True).load(KEY, files(tmp_path))


def test_a_provider_that_rejects_the_model_is_refused(tmp_path: Path) -> None:
    def broken(model: bytes, options: Mapping[str, str]) -> Session:
        raise LoadFailed("core ml rejects the model: bad operator")

    told: list[str] = []
    setup = Setup(use_ane=True, make_session=broken, environment="ort-test")
    CoreMLEngine(Settings(), setup, on_fallback=told.append).load(KEY, files(tmp_path))
    assert told == [REFUSED]


def test_a_run_that_fails_is_an_error_not_an_empty_answer(tmp_path: Path) -> None:
    graph = open_graph(save_model(tmp_path), Factory())
    with pytest.raises(InferenceError, match="core ml: tiny"):
        graph.run({"wrong": pictures(1)})
