import asyncio
import io
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from doubles.engines import FILES, FakeModel, FakeStore, FixedEngines, Gate, soon
from doubles.timing import until
from PIL import Image

from immich_ml_metal.backends.base import AnyModel
from immich_ml_metal.backends.device import Device
from immich_ml_metal.errors import (
    Busy,
    InferenceError,
    InvalidImage,
    LoadFailed,
    MissingDependency,
    MissingPayload,
    TimedOut,
)
from immich_ml_metal.metrics import Metrics
from immich_ml_metal.tasks.clip import SearchQuery
from immich_ml_metal.tasks.faces import FaceCrop, FaceQuery
from immich_ml_metal.tasks.images import ImageLimits, Picture, decode
from immich_ml_metal.tasks.text_boxes import TextRegionQuery
from immich_ml_metal.tasks.text_lines import LineCrop
from immich_ml_metal.threads import CpuThreads
from immich_ml_metal.types import (
    ClipTextual,
    ClipVisual,
    FaceDetection,
    FaceRecognition,
    Faces,
    ModelFiles,
    ModelKey,
    Part,
    Reading,
    RecognisedFaces,
    Task,
    TaskRequest,
    TextDetection,
    TextLines,
    TextRecognition,
    TextRegions,
)
from immich_ml_metal.worker.picture_cache import PictureCache
from immich_ml_metal.worker.pipeline import ITEMS_AT_ONCE, Pipeline, keep_lines, model_keys
from immich_ml_metal.worker.pool import Pool
from immich_ml_metal.worker.second_try import SecondTry

VISUAL = ModelKey(Task.CLIP, Part.VISUAL, "c")
TEXTUAL = ModelKey(Task.CLIP, Part.TEXTUAL, "c")
DETECTOR = ModelKey(Task.FACES, Part.DETECTION, "f")
EMBEDDER = ModelKey(Task.FACES, Part.RECOGNITION, "f")
FINDER = ModelKey(Task.OCR, Part.DETECTION, "o")
READER = ModelKey(Task.OCR, Part.RECOGNITION, "o")
KEYS = (VISUAL, TEXTUAL, DETECTOR, EMBEDDER, FINDER, READER)

FACES = Faces(
    boxes=np.array([[1, 2, 3, 4], [5, 6, 7, 8]], np.float32),
    scores=np.array([0.9, 0.8], np.float32),
    landmarks=np.arange(20, dtype=np.float32).reshape(2, 5, 2),
)
QUADS = np.array([[[0, 0], [20, 0], [20, 10], [0, 10]], [[2, 2], [8, 2], [8, 8], [2, 8]]])
REGIONS = TextRegions(QUADS.astype(np.float32), np.array([0.7, 0.6], np.float32))


@dataclass
class Scripted(FakeModel):
    """Answers what a function makes of the item, and remembers the items."""

    answer: Callable[[Any], Any] = lambda item: item

    def postprocess(self, raw: Any, item: Any) -> Any:
        super().postprocess(raw, item)
        return self.answer(item)


class Stage:
    """A pipeline whose models answer by script; the engine of every half."""

    name = "scripted"
    needs_files = True

    def __init__(
        self,
        *,
        timeout_s: float = 30.0,
        without: set[ModelKey] | None = None,
        giant_pixels: int = 10_000,
    ) -> None:
        self.device = Device("scripted", width=2)
        self.models = {
            VISUAL: Scripted(answer=lambda _: np.ones(4, np.float32)),
            TEXTUAL: Scripted(answer=lambda _: np.zeros(4, np.float32)),
            DETECTOR: Scripted(answer=lambda _: FACES),
            EMBEDDER: Scripted(answer=lambda crop: np.full(512, crop.landmarks[0, 0], np.float32)),
            FINDER: Scripted(answer=lambda _: REGIONS),
            READER: Scripted(answer=lambda crop: Reading(str(int(crop.quad[1, 0])), 0.95)),
        }
        self.loaded: list[ModelKey] = []
        self.broken: dict[ModelKey, Exception] = {}
        self.loads = Gate(is_open=True)
        self.threads, self.metrics = CpuThreads(2), Metrics()
        table = {(key.task, key.part): self for key in KEYS if key not in (without or set())}
        self.pool = Pool(FixedEngines(table), FakeStore(), self.threads, self.metrics)
        limits = ImageLimits(10_000, 200)
        self.decoded: list[bytes] = []

        def decode_and_tell(data: bytes) -> Picture:
            self.decoded.append(data)
            return decode(data, limits)

        pictures = PictureCache(decode_and_tell, self.threads, max_bytes=0)
        models = SecondTry(self.pool, None, self.metrics, limit_s=timeout_s)
        self.pipeline = Pipeline(
            models, pictures, self.metrics, timeout_s=timeout_s, giant_pixels=giant_pixels
        )

    def load(self, key: ModelKey, files: ModelFiles | None) -> AnyModel:
        assert files == FILES
        self.loads.pass_through()
        if key in self.broken:
            raise self.broken[key]
        self.loaded.append(key)
        return self.models[key]

    async def ask(self, request: TaskRequest, image: bytes | None = None, **kw: Any) -> Any:
        return await soon(self.pipeline.answer(request, image, kw.get("text")))


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    stage = Stage()
    yield stage
    await close(stage)


async def close(stage: Stage) -> None:
    await stage.pool.close()
    stage.threads.close()


def picture(width: int = 40, height: int = 20) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(buffer, "PNG")
    return buffer.getvalue()


async def test_a_picture_is_embedded(stage: Stage) -> None:
    answer = await stage.ask(TaskRequest(clip_visual=ClipVisual(VISUAL)), picture())
    assert answer.size == (40, 20)
    assert answer.clip.tolist() == [1, 1, 1, 1]
    assert (answer.faces, answer.text) == (None, None)


async def test_a_text_is_embedded_with_its_language(stage: Stage) -> None:
    request = TaskRequest(clip_textual=ClipTextual(TEXTUAL, "de"))
    answer = await stage.ask(request, text="Hund")
    assert answer.clip.tolist() == [0, 0, 0, 0]
    assert answer.size is None
    assert stage.models[TEXTUAL].batches == [[SearchQuery("Hund", "de")]]


async def test_every_found_face_is_embedded_in_order(stage: Stage) -> None:
    request = TaskRequest(
        face_detection=FaceDetection(DETECTOR, 0.3), face_recognition=FaceRecognition(EMBEDDER)
    )
    answer = await stage.ask(request, picture())
    assert isinstance(answer.faces, RecognisedFaces)
    assert answer.faces.embeddings[:, 0].tolist() == [0, 10]
    assert stage.models[DETECTOR].batches[0][0].min_score == 0.3
    crops = [item for batch in stage.models[EMBEDDER].batches for item in batch]
    assert {type(crop) for crop in crops} == {FaceCrop}


async def test_no_face_gives_an_empty_table_of_vectors(stage: Stage) -> None:
    none = Faces(FACES.boxes[:0], FACES.scores[:0], FACES.landmarks[:0])
    stage.models[DETECTOR].answer = lambda _: none
    request = TaskRequest(
        face_detection=FaceDetection(DETECTOR), face_recognition=FaceRecognition(EMBEDDER)
    )
    answer = await stage.ask(request, picture())
    assert answer.faces.embeddings.shape == (0, 512)


async def test_detection_alone_answers_what_it_found(stage: Stage) -> None:
    request = TaskRequest(
        face_detection=FaceDetection(DETECTOR), text_detection=TextDetection(FINDER, 0.4, 99)
    )
    answer = await stage.ask(request, picture())
    assert answer.faces is FACES
    assert answer.text is REGIONS
    (query,) = stage.models[FINDER].batches[0]
    assert isinstance(query, TextRegionQuery)
    assert (query.min_score, query.max_resolution) == (0.4, 99)
    assert isinstance(stage.models[DETECTOR].batches[0][0], FaceQuery)


async def test_every_found_line_is_read_in_order(stage: Stage) -> None:
    request = TaskRequest(
        text_detection=TextDetection(FINDER), text_recognition=TextRecognition(READER, 0.9)
    )
    answer = await stage.ask(request, picture())
    assert isinstance(answer.text, TextLines)
    assert answer.text.texts == ("20", "8")
    assert answer.text.quads[0].tolist() == [[0, 0], [0.5, 0], [0.5, 0.5], [0, 0.5]]
    assert {type(i) for batch in stage.models[READER].batches for i in batch} == {LineCrop}


async def test_a_detector_that_reads_as_well_needs_no_reader() -> None:
    stage = Stage(without={READER})
    readings = (Reading("one", 0.99), Reading("two", 0.5))
    stage.models[FINDER].answer = lambda _: TextRegions(REGIONS.quads, REGIONS.scores, readings)
    request = TaskRequest(
        text_detection=TextDetection(FINDER), text_recognition=TextRecognition(READER, 0.9)
    )
    answer = await stage.ask(request, picture())
    assert answer.text.texts == ("one",)
    assert stage.loaded == [FINDER]
    await close(stage)


async def test_tasks_of_one_request_share_the_decoded_picture(stage: Stage) -> None:
    request = TaskRequest(
        clip_visual=ClipVisual(VISUAL),
        face_detection=FaceDetection(DETECTOR),
        text_detection=TextDetection(FINDER),
    )
    await stage.ask(request, picture())
    seen = stage.models[VISUAL].batches[0][0]
    assert stage.models[DETECTOR].batches[0][0].picture is seen
    assert stage.models[FINDER].batches[0][0].picture is seen


async def test_a_request_with_many_faces_leaves_turns_to_others(stage: Stage) -> None:
    count = 10 * ITEMS_AT_ONCE
    many = Faces(
        np.ones((count, 4), np.float32),
        np.ones(count, np.float32),
        FACES.landmarks[:1].repeat(count, 0),
    )
    stage.models[DETECTOR].answer = lambda _: many
    stage.models[EMBEDDER].gate.close()
    faces = TaskRequest(
        face_detection=FaceDetection(DETECTOR), face_recognition=FaceRecognition(EMBEDDER)
    )
    asked = asyncio.create_task(stage.ask(faces, picture()))
    device, embedder = stage.device, stage.models[EMBEDDER]
    await until(lambda: device.queued + sum(map(len, embedder.batches)) == ITEMS_AT_ONCE)
    embedder.gate.open()
    answer = await asked
    assert answer.faces.embeddings.shape == (count, 512)


async def test_a_second_giant_picture_is_asked_to_come_again() -> None:
    stage = Stage(giant_pixels=39 * 20)
    model = stage.models[VISUAL]
    model.gate.close()
    request = TaskRequest(clip_visual=ClipVisual(VISUAL))
    first = asyncio.create_task(stage.ask(request, picture(40)))
    small = asyncio.create_task(stage.ask(request, picture(39)))  # just not giant
    await until(lambda: sum(map(len, model.batches)) == 2)
    with pytest.raises(Busy, match="another giant picture"):
        await stage.ask(request, picture(41))
    model.gate.open()
    await asyncio.gather(first, small)
    await stage.ask(request, picture(41))
    assert len(stage.decoded) == 3
    await close(stage)


async def test_all_models_of_a_request_load_before_any_runs(stage: Stage) -> None:
    stage.broken[EMBEDDER] = LoadFailed("no")
    request = TaskRequest(
        face_detection=FaceDetection(DETECTOR), face_recognition=FaceRecognition(EMBEDDER)
    )
    with pytest.raises(LoadFailed):
        await stage.ask(request, picture())
    assert stage.loaded == [DETECTOR]
    assert stage.models[DETECTOR].batches == []


@pytest.mark.parametrize("image", [b"", b"text", picture()[:60]])
async def test_a_broken_picture_loads_no_model(stage: Stage, image: bytes) -> None:
    with pytest.raises(InvalidImage):
        await stage.ask(TaskRequest(clip_visual=ClipVisual(VISUAL)), image)
    assert stage.loaded == []


@pytest.mark.parametrize(
    ("request_", "image", "text", "error", "message"),
    [
        (TaskRequest(clip_visual=ClipVisual(VISUAL)), None, None, MissingPayload, "Either image"),
        (
            TaskRequest(clip_visual=ClipVisual(VISUAL)),
            None,
            "cat",
            MissingPayload,
            "needs image, the request has a text",
        ),
        (
            TaskRequest(clip_textual=ClipTextual(TEXTUAL)),
            True,
            None,
            MissingPayload,
            "needs text, the request has an image",
        ),
        (
            TaskRequest(clip_visual=ClipVisual(VISUAL), clip_textual=ClipTextual(TEXTUAL)),
            True,
            "cat",
            MissingPayload,
            "clip textual needs text, the request has an image",
        ),
        (
            TaskRequest(face_recognition=FaceRecognition(EMBEDDER)),
            True,
            None,
            MissingDependency,
            "facial-recognition recognition depends on",
        ),
        (
            TaskRequest(text_recognition=TextRecognition(READER)),
            True,
            None,
            MissingDependency,
            "ocr recognition depends on",
        ),
    ],
)
async def test_a_request_that_cannot_be_answered_is_refused_before_any_load(
    stage: Stage,
    request_: TaskRequest,
    image: bool | None,
    text: str | None,
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        await stage.ask(request_, picture() if image else None, text=text)
    assert stage.loaded == []


async def test_the_first_failure_is_told_once_everything_has_ended(stage: Stage) -> None:
    stage.models[VISUAL].fail["infer"] = InferenceError("first")
    gate = stage.models[FINDER].gate = Gate()
    request = TaskRequest(clip_visual=ClipVisual(VISUAL), text_detection=TextDetection(FINDER))
    work = asyncio.create_task(stage.ask(request, picture()))
    await until(lambda: gate.waiting == 1 and bool(stage.models[VISUAL].batches))
    await asyncio.sleep(0.01)
    assert not work.done()
    gate.open()
    with pytest.raises(InferenceError, match="first"):
        await work


async def test_work_over_its_time_is_given_up_and_frees_the_model() -> None:
    stage = Stage(timeout_s=0.05)
    gate = stage.models[VISUAL].gate = Gate()
    with pytest.raises(TimedOut, match=r"no answer within 0\.05 s"):
        await stage.ask(TaskRequest(clip_visual=ClipVisual(VISUAL)), picture())
    assert stage.pool.loaded[0].users == 0
    gate.open()
    await close(stage)


async def test_loading_does_not_count_as_time_of_the_request() -> None:
    stage = Stage(timeout_s=1.0)
    stage.loads.close()
    work = asyncio.create_task(
        stage.ask(TaskRequest(clip_textual=ClipTextual(TEXTUAL)), text="cat")
    )
    await until(lambda: stage.loads.waiting == 1)
    await asyncio.sleep(1.1)
    stage.loads.open()
    assert (await work).clip is not None
    await close(stage)


async def test_a_timeout_raised_by_a_library_is_not_taken_for_ours(stage: Stage) -> None:
    stage.models[VISUAL].fail["preprocess"] = TimeoutError("a disk was slow")
    with pytest.raises(TimeoutError, match="a disk was slow"):
        await stage.ask(TaskRequest(clip_visual=ClipVisual(VISUAL)), picture())


async def test_faces_and_lines_are_counted(stage: Stage) -> None:
    request = TaskRequest(
        face_detection=FaceDetection(DETECTOR),
        text_detection=TextDetection(FINDER),
        text_recognition=TextRecognition(READER),
    )
    await stage.ask(request, picture())
    value = stage.metrics.registry.get_sample_value
    assert value("immich_ml_faces_found_total") == 2
    assert value("immich_ml_text_lines_found_total") == 2


def test_a_line_must_score_above_its_limit_not_at_it() -> None:
    readings = [Reading("at", 0.5), Reading("above", 0.75)]
    lines = keep_lines(REGIONS, readings, size=(40, 20), min_score=0.5)
    assert lines.texts == ("above",)
    assert lines.text_scores.tolist() == [0.75]
    assert lines.box_scores.tolist() == pytest.approx([0.6])
    assert lines.quads.tolist() == pytest.approx(
        np.array([[[0.05, 0.1], [0.2, 0.1], [0.2, 0.4], [0.05, 0.4]]])
    )
    assert lines.quads.dtype == np.float32


def test_an_empty_page_gives_four_empty_columns() -> None:
    empty = TextRegions(REGIONS.quads[:0], REGIONS.scores[:0])
    lines = keep_lines(empty, [], size=(40, 20), min_score=0.5)
    assert lines.texts == ()
    assert lines.quads.shape == (0, 4, 2)
    assert (lines.box_scores.size, lines.text_scores.size) == (0, 0)


def test_the_models_of_a_request_are_named() -> None:
    request = TaskRequest(
        face_detection=FaceDetection(DETECTOR), face_recognition=FaceRecognition(EMBEDDER)
    )
    assert model_keys(request) == [DETECTOR, EMBEDDER]
    assert model_keys(TaskRequest()) == []
