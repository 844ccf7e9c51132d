"""A failure in any stage of any task is a non-2xx with its reason, never an empty result."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from doubles.engines import FakeStore, every_part
from doubles.live import TEXTUAL, VISUAL, face_entries, predict, serve, text_entries
from doubles.tiny_models import draw_faces, draw_text, make_models

from immich_ml_metal.backends.base import AnyModel
from immich_ml_metal.backends.ort.engine import OrtEngine
from immich_ml_metal.errors import DownloadFailed, LoadFailed
from immich_ml_metal.models.store import ModelStore
from immich_ml_metal.settings import Settings
from immich_ml_metal.types import ModelFiles, ModelKey, Part, Task, Tensor
from immich_ml_metal.worker.compose import build_app
from immich_ml_metal.worker.server import create_app

# NumPy warns of overflow and NaN, which would stop a test but never the service.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

PHOTO, PAGE = draw_faces((160, 160)), draw_text("abc")
HALVES = [
    (Task.CLIP, Part.VISUAL),
    (Task.CLIP, Part.TEXTUAL),
    (Task.FACES, Part.DETECTION),
    (Task.FACES, Part.RECOGNITION),
    (Task.OCR, Part.DETECTION),
    (Task.OCR, Part.RECOGNITION),
]
Half = tuple[Task, Part]


def call(url: str, half: Half) -> Any:
    """The request of Immich that goes through this half of a model."""
    if half == (Task.CLIP, Part.TEXTUAL):
        return predict(url, TEXTUAL, text="red sea")
    entries, image = {
        Task.CLIP: (VISUAL, PHOTO),
        Task.FACES: (face_entries(), PHOTO),
        Task.OCR: (text_entries(), PAGE),
    }[half[0]]
    return predict(url, entries, image=image)


class Panic(BaseException):
    """What a Rust library raises."""


@dataclass
class Faults:
    """What is broken: a verb of a half, or what its graph gives."""

    raised: dict[tuple[Half, str], BaseException] = field(default_factory=dict)
    outputs: dict[Half, Callable[[Sequence[Tensor]], Sequence[Tensor]]] = field(
        default_factory=dict
    )

    def check(self, half: Half, verb: str) -> None:
        if (half, verb) in self.raised:
            raise self.raised[half, verb]


class Saboteur:
    """A model that fails when it is told to, and otherwise is the real one."""

    def __init__(self, model: AnyModel, half: Half, faults: Faults) -> None:
        self._model, self._half, self._faults = model, half, faults
        self.max_batch, self.size_bytes = model.max_batch, model.size_bytes

    def preprocess(self, item: Any) -> Any:
        self._faults.check(self._half, "preprocess")
        return self._model.preprocess(item)

    def infer(self, batch: Sequence[Any]) -> Sequence[Any]:
        self._faults.check(self._half, "infer")
        return self._model.infer(batch)

    def postprocess(self, raw: Any, item: Any) -> Any:
        self._faults.check(self._half, "postprocess")
        return self._model.postprocess(raw, item)

    def close(self) -> None:
        self._model.close()


class SpoiltGraph:
    """A graph whose outputs are changed on their way out."""

    def __init__(self, graph: Any, half: Half, faults: Faults) -> None:
        self._graph, self._half, self._faults = graph, half, faults
        for name in ("inputs", "outputs", "metadata", "max_batch", "fixed_shapes", "size_bytes"):
            setattr(self, name, getattr(graph, name))

    def run(self, feeds: Mapping[str, Tensor]) -> list[Tensor]:
        outputs = self._graph.run(feeds)
        spoil = self._faults.outputs.get(self._half)
        return list(spoil(outputs)) if spoil else list(outputs)

    def close(self) -> None:
        self._graph.close()


class BrokenEngine:
    """The real engine, with faults put in."""

    name = "cpu"
    needs_files = True

    def __init__(self, settings: Settings, faults: Faults) -> None:
        self._engine = OrtEngine(settings)
        self._faults = faults
        self.device = self._engine.device

    def load(self, key: ModelKey, files: ModelFiles | None) -> AnyModel:
        half = (key.task, key.part)
        self._faults.check(half, "load")
        model: Any = self._engine.load(key, files)
        model._graph = SpoiltGraph(model._graph, half, self._faults)
        return Saboteur(model, half, self._faults)


@pytest.fixture(scope="module")
def broken(models: Path) -> Iterator[tuple[str, Faults]]:
    settings, faults = Settings(models_dir=models, offline=True, model_ttl_s=0), Faults()
    engine = BrokenEngine(settings, faults)
    with serve(create_app(settings, every_part(engine), ModelStore(settings))) as url:
        yield url, faults


@pytest.fixture
def faulty(broken: tuple[str, Faults]) -> Iterator[tuple[str, Faults]]:
    yield broken
    broken[1].raised.clear()
    broken[1].outputs.clear()


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("verb", ["preprocess", "infer", "postprocess"])
@pytest.mark.parametrize(
    "error",
    [ValueError("forced"), Panic("forced")],
    ids=lambda error: type(error).__name__,
)
def test_a_verb_that_raises_is_a_500_with_its_reason(
    faulty: tuple[str, Faults], half: Half, verb: str, error: BaseException
) -> None:
    url, faults = faulty
    faults.raised[half, verb] = error
    answer = call(url, half)
    assert (answer.status_code, "forced" in answer.json()["detail"]) == (500, True), answer.text
    faults.raised.clear()
    assert call(url, half).status_code == 200


@pytest.mark.parametrize(
    ("half", "error"),
    list(
        zip(
            HALVES,
            itertools.cycle([LoadFailed("forced"), OSError("forced"), Panic("forced")]),
            strict=False,
        )
    ),
)
def test_a_load_that_raises_is_told_and_tried_again(
    models: Path, half: Half, error: BaseException
) -> None:
    settings, faults = Settings(models_dir=models, offline=True), Faults()
    faults.raised[half, "load"] = error
    app = create_app(settings, every_part(BrokenEngine(settings, faults)), ModelStore(settings))
    with serve(app) as url:
        answer = call(url, half)
        assert answer.status_code == 500
        assert "forced" in answer.json()["detail"]
        faults.raised.clear()
        assert call(url, half).status_code == 200


def first(change: Callable[[Tensor], Tensor]) -> Callable[[Sequence[Tensor]], Sequence[Tensor]]:
    return lambda outputs: [change(outputs[0]), *outputs[1:]]


def every(change: Callable[[Tensor], Tensor]) -> Callable[[Sequence[Tensor]], Sequence[Tensor]]:
    return lambda outputs: [change(output) for output in outputs]


def put(value: float) -> Callable[[Tensor], Tensor]:
    def change(output: Tensor) -> Tensor:
        output = output.copy()
        output.flat[output.size // 2] = value
        return output

    return change


def fill(value: float) -> Callable[[Tensor], Tensor]:
    return lambda output: np.full_like(output, value)


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("amount", [put, fill])
def test_numbers_that_are_not_finite_are_a_500(
    faulty: tuple[str, Faults],
    half: Half,
    value: float,
    amount: Callable[[float], Callable[[Tensor], Tensor]],
) -> None:
    url, faults = faulty
    faults.outputs[half] = every(amount(value))
    answer = call(url, half)
    if half == (Task.OCR, Part.RECOGNITION) and amount is put and value == -np.inf:
        return  # one class of one step that is impossible: a finite reading is left
    assert answer.status_code == 500, answer.text[:300]
    assert "not finite" in answer.json()["detail"]


@pytest.mark.parametrize(
    "half", [half for half in HALVES if half[0] is Task.CLIP or half == HALVES[3]]
)
@pytest.mark.parametrize("size", [0, 1, 511, 513, 1024])
def test_a_vector_of_another_length_is_a_500(
    faulty: tuple[str, Faults], half: Half, size: int
) -> None:
    url, faults = faulty
    faults.outputs[half] = first(lambda output: np.zeros((len(output), size), np.float32))
    answer = call(url, half)
    assert answer.status_code == 500
    assert f"{size} values, the model's dimension is 512" in answer.json()["detail"]


def test_face_heads_of_another_number_or_shape_are_a_500(faulty: tuple[str, Faults]) -> None:
    url, faults = faulty
    half = (Task.FACES, Part.DETECTION)
    changes: list[Callable[[Sequence[Tensor]], Sequence[Tensor]]] = [
        lambda outputs: outputs[:8],
        lambda outputs: [outputs[3], *outputs[1:]],
    ]
    for change in changes:
        faults.outputs[half] = change
        answer = call(url, half)
        assert answer.status_code == 500
        assert "not SCRFD" in answer.json()["detail"]


def test_faces_whose_boxes_overflow_are_a_500_and_never_null(faulty: tuple[str, Faults]) -> None:
    url, faults = faulty
    faults.outputs[Task.FACES, Part.DETECTION] = lambda outputs: [
        np.full_like(head, 3e38) if head.shape[-1] > 1 else head for head in outputs
    ]
    alone = face_entries()
    del alone["facial-recognition"]["recognition"]
    for entries in (face_entries(), alone):
        answer = predict(url, entries, image=PHOTO)
        assert answer.status_code == 500, answer.text[:200]
        assert "not finite" in answer.json()["detail"]


def test_a_reader_with_another_number_of_characters_is_a_500(faulty: tuple[str, Faults]) -> None:
    url, faults = faulty
    faults.outputs[Task.OCR, Part.RECOGNITION] = first(lambda output: output[..., :3])
    answer = call(url, (Task.OCR, Part.RECOGNITION))
    assert answer.status_code == 500
    assert "3 classes, its character list has 5" in answer.json()["detail"]


@pytest.mark.parametrize("half", HALVES)
def test_no_output_at_all_is_a_500(faulty: tuple[str, Faults], half: Half) -> None:
    url, faults = faulty
    faults.outputs[half] = lambda _: []
    assert call(url, half).status_code == 500


def test_an_answer_that_cannot_be_rendered_is_a_500(faulty: tuple[str, Faults]) -> None:
    url, faults = faulty

    class Odd(Exception):
        pass

    faults.raised[(Task.CLIP, Part.VISUAL), "postprocess"] = Odd("forced")
    answer = call(url, (Task.CLIP, Part.VISUAL))
    assert answer.json() == {"detail": "internal error: Odd: forced"}


def test_a_download_that_fails_is_a_503_with_its_reason(models: Path) -> None:
    settings = Settings(models_dir=models)
    store = FakeStore(failures=[DownloadFailed("no route to the hub")])
    app = create_app(settings, every_part(OrtEngine(settings)), store)
    with serve(app) as url:
        answer = call(url, (Task.CLIP, Part.TEXTUAL))
    assert (answer.status_code, answer.json()) == (503, {"detail": "no route to the hub"})
    assert answer.headers["retry-after"] == "5"  # the gateway asks again


@pytest.mark.parametrize(
    ("path", "content", "words"),
    [
        ("clip/ViT-B-32__openai/visual/preprocess_cfg.json", b'{"size": 32}', "mean"),
        ("clip/ViT-B-32__openai/visual/preprocess_cfg.json", b"[]", "no JSON object"),
        ("clip/ViT-B-32__openai/textual/tokenizer.json", b"{}", "not a tokenizer"),
        ("clip/ViT-B-32__openai/textual/tokenizer_config.json", b"{}", "pad_token None"),
        ("facial-recognition/buffalo_s/detection/model.onnx", None, "9"),
    ],
)
def test_files_that_are_whole_but_wrong_are_told_by_name(
    tmp_path: Path, models: Path, path: str, content: bytes | None, words: str
) -> None:
    make_models(tmp_path)
    wrong = models / "facial-recognition/buffalo_s/recognition/model.onnx"
    (tmp_path / path).write_bytes(wrong.read_bytes() if content is None else content)
    task, part = Task(path.split("/")[0]), Part(path.split("/")[2])
    with serve(build_app(Settings(models_dir=tmp_path, offline=True))) as url:
        answer = call(url, (task, part))
    assert answer.status_code == 500
    assert words in answer.json()["detail"]


def test_a_torn_file_is_never_loaded(tmp_path: Path) -> None:
    make_models(tmp_path)
    graph = tmp_path / "ocr/PP-OCRv6_tiny/detection/model.onnx"
    graph.write_bytes(graph.read_bytes()[:-20])
    with serve(build_app(Settings(models_dir=tmp_path, offline=True))) as url:
        answer = call(url, (Task.OCR, Part.DETECTION))
    assert answer.status_code == 503
    assert "is damaged" in answer.json()["detail"]
