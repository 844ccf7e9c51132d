import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from doubles.tiny_models import CLIP, FACES, FLOAT, OCR, Net, make_textual, make_visual
from onnx import TensorProto

from immich_ml_metal.backends.ort.adaptive import PATIENCE, AdaptiveGraph
from immich_ml_metal.backends.ort.engine import OrtEngine
from immich_ml_metal.backends.ort.session import OrtGraph, disabled_optimizers, session_options
from immich_ml_metal.catalog import model_key
from immich_ml_metal.errors import InferenceError, LoadFailed
from immich_ml_metal.settings import Settings
from immich_ml_metal.types import ModelFiles, Part, Task


def graph(path: Path) -> OrtGraph:
    return OrtGraph(path, options=session_options(1))


def test_a_graph_tells_its_inputs_outputs_and_size(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    make_textual(path)
    loaded = graph(path)
    (spec,) = loaded.inputs
    assert (spec.name, spec.dtype, spec.shape) == ("text", np.dtype(np.int32), (None, 8))
    assert loaded.outputs[0].name == "embedding"
    assert loaded.size_bytes == path.stat().st_size
    assert loaded.max_batch == 1
    assert not loaded.fixed_shapes


def test_a_graphs_own_notes_are_readable(models: Path) -> None:
    reader = graph(models / "ocr/PP-OCRv6_tiny/recognition/model.onnx")
    assert reader.metadata == {"character": "a\nb\nc"}


def test_a_graph_computes_every_output(tmp_path: Path) -> None:
    net = Net()
    net.add("Add", "x", net.const(1.0), name="more")
    net.add("Mul", "x", net.const(2.0), name="twice")
    path = tmp_path / "model.onnx"
    net.save(path, ("x", FLOAT, ["n"]), [("more", FLOAT, ["n"]), ("twice", FLOAT, ["n"])])
    more, twice = graph(path).run({"x": np.array([1, 5], np.float32)})
    assert (more.tolist(), twice.tolist()) == ([2, 6], [2, 10])


FIRST_SESSION = """
import sys
from pathlib import Path
import numpy as np
from immich_ml_metal.backends.ort.session import OrtGraph, session_options
smallest = np.full(400_000, np.finfo(np.float32).tiny, np.float32)
graph = OrtGraph(Path(sys.argv[1]), options=session_options(2))
print(graph.run({"x": smallest})[0].any())
"""


def test_a_number_too_small_for_full_precision_is_zero(tmp_path: Path) -> None:
    """In a process of its own: ONNX Runtime sets a caller's flag at its first session only."""
    net = Net()
    net.add("Mul", "x", net.const(0.5), name="y")
    net.save(tmp_path / "m.onnx", ("x", FLOAT, ["n"]), [("y", FLOAT, ["n"])])
    command = [sys.executable, "-c", FIRST_SESSION, str(tmp_path / "m.onnx")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (TensorProto.FLOAT16, np.float16),
        (TensorProto.DOUBLE, np.float64),
        (TensorProto.UINT8, np.uint8),
        (TensorProto.INT64, np.int64),
        (TensorProto.BOOL, np.bool_),
    ],
)
def test_element_types_are_told(tmp_path: Path, kind: int, dtype: type) -> None:
    net = Net()
    net.add("Identity", "x", name="y")
    net.save(tmp_path / "m.onnx", ("x", kind, ["n"]), [("y", kind, ["n"])])
    assert graph(tmp_path / "m.onnx").inputs[0].dtype == np.dtype(dtype)


@pytest.mark.parametrize("content", [b"", b"not a model", bytes(100)])
def test_a_file_that_is_no_model_is_told(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(LoadFailed, match="ONNX Runtime rejects"):
        graph(path)


def test_an_operator_nobody_knows_fails_the_load(tmp_path: Path) -> None:
    net = Net()
    net.add("Sparkle", "x", name="y")
    net.save(tmp_path / "m.onnx", ("x", FLOAT, ["n"]), [("y", FLOAT, ["n"])])
    with pytest.raises(LoadFailed, match="Sparkle"):
        graph(tmp_path / "m.onnx")


@pytest.mark.parametrize(
    "feeds",
    [{}, {"other": np.zeros((1, 8), np.int32)}, {"text": np.zeros((1, 7), np.int32)}],
)
def test_a_run_that_the_graph_refuses_is_an_inference_error(
    tmp_path: Path, feeds: dict[str, np.ndarray]
) -> None:
    make_textual(tmp_path / "m.onnx")
    with pytest.raises(InferenceError, match="ONNX Runtime"):
        graph(tmp_path / "m.onnx").run(feeds)


def test_a_closed_graph_cannot_run(tmp_path: Path) -> None:
    make_textual(tmp_path / "m.onnx")
    loaded = graph(tmp_path / "m.onnx")
    loaded.close()
    with pytest.raises((InferenceError, AttributeError)):
        loaded.run({"text": np.zeros((1, 8), np.int32)})


def test_sessions_neither_spin_nor_keep_their_peak() -> None:
    options = session_options(3)
    assert options.intra_op_num_threads == 3
    assert not options.enable_cpu_mem_arena
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert set(disabled_optimizers()) <= {"ConvAddActivationFusion"}


@pytest.mark.parametrize(("threads", "expected"), [(1, 1), (3, 3)])
def test_the_setting_chooses_the_threads_of_one_inference(
    tmp_path: Path, threads: int, expected: int
) -> None:
    make_visual(tmp_path / "visual/model.onnx")
    (tmp_path / "visual/preprocess_cfg.json").write_text(
        '{"size": 32, "mean": [0, 0, 0], "std": [1, 1, 1]}'
    )
    engine = OrtEngine(Settings(intra_op_threads=threads))
    files = ModelFiles(tmp_path / "visual/model.onnx", tmp_path / "visual", tmp_path)
    model = engine.load(model_key(CLIP, Task.CLIP, Part.VISUAL), files)
    assert model._graph.threads == expected  # type: ignore[attr-defined]
    model.close()
    engine.device.close()


def test_a_lone_text_keeps_all_cores_beside_pictures_and_pictures_share_theirs(
    models: Path,
) -> None:
    engine = OrtEngine(Settings(intra_op_threads=2))

    def load(task: Task, part: Part, name: str, folder: str) -> AdaptiveGraph:
        files = ModelFiles(models / folder / "model.onnx", models / folder, models)
        graph = engine.load(model_key(name, task, part), files)._graph  # type: ignore[attr-defined]
        assert isinstance(graph, AdaptiveGraph)
        return graph

    text = load(Task.OCR, Part.DETECTION, OCR, f"ocr/{OCR}/detection")
    faces = load(Task.FACES, Part.DETECTION, FACES, f"facial-recognition/{FACES}/detection")
    with load(Task.CLIP, Part.VISUAL, CLIP, f"clip/{CLIP}/visual")._load.enter():
        for graph, side_px in ((text, 32), (faces, 640)):
            (name,) = (spec.name for spec in graph.inputs)
            for _ in range(PATIENCE):
                graph.run({name: np.zeros((1, 3, side_px, side_px), np.float32)})
    assert (text.threads, faces.threads) == (2, 1)
    engine.device.close()


def test_the_tiny_graphs_are_valid_onnx(models: Path) -> None:
    found = sorted(models.rglob("model.onnx"))
    assert len(found) == 16
    for path in found:
        onnx.checker.check_model(onnx.load(path), full_check=True)
    assert sum(path.stat().st_size for path in found) < 400_000
