"""One request: decode once, run its tasks in dependency order, gather the answers.

Knows nothing about HTTP or hardware. A failure in any stage fails the request: an empty result
means *looked and found nothing*.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import numpy as np

from immich_ml_metal.errors import Busy, MissingDependency, MissingPayload, TimedOut
from immich_ml_metal.metrics import Metrics
from immich_ml_metal.tasks.clip import SearchQuery
from immich_ml_metal.tasks.faces import FaceCrop, FaceQuery
from immich_ml_metal.tasks.images import Picture
from immich_ml_metal.tasks.text_boxes import TextRegionQuery
from immich_ml_metal.tasks.text_lines import LineCrop
from immich_ml_metal.types import (
    Answer,
    FaceDetection,
    FaceRecognition,
    Faces,
    Floats,
    ModelKey,
    Reading,
    RecognisedFaces,
    TaskRequest,
    TextDetection,
    TextLines,
    TextRecognition,
    TextRegions,
)
from immich_ml_metal.urgency import Urgency, urgency_of
from immich_ml_metal.worker.picture_cache import PictureCache
from immich_ml_metal.worker.second_try import SecondTry

T = TypeVar("T")

GIANT_PIXELS = 32_000_000  # ten previews' worth: some 220 MB decoded
ITEMS_AT_ONCE = 16  # of one request: two full batches
FACE_VECTOR_DIM = 512  # of every face model, fixed by Immich's database (contract §1.7)


class Pipeline:
    """Answers requests with the models of the service."""

    def __init__(
        self,
        models: SecondTry,
        pictures: PictureCache,
        metrics: Metrics,
        *,
        timeout_s: float,
        giant_pixels: int = GIANT_PIXELS,
    ) -> None:
        """Work with these.

        Args:
            models: runs each item, on whichever engine can.
            pictures: decodes, once per picture.
            metrics: is told of stages, faces and lines.
            timeout_s: limits the work itself, not the loading of models before it.
            giant_pixels: pictures above this are worked on one at a time.
        """
        self._models = models
        self._pictures = pictures
        self._metrics = metrics
        self._timeout_s = timeout_s
        self._giant_pixels = giant_pixels
        self._giants = asyncio.Semaphore(1)

    async def answer(self, request: TaskRequest, image: bytes | None, text: str | None) -> Answer:
        """Do everything `request` asks for; an image wins over a text.

        Raises:
            RequestError: the payload is missing, broken, or not what a task needs.
            ModelError: a model cannot be fetched or loaded.
            InferenceError, InvalidOutput, TimedOut: an engine failed.
        """
        if image is not None:
            urgency = urgency_of_tasks(request)
            async with self._room_for(image, urgency):
                picture = await self._decode(image, urgency)
                _check_request(request, has_image=True)
                await self._load_models(request)
                return await self._timed(self._look(request, picture))
        if text is None:
            raise MissingPayload("Either image or text must be provided")
        _check_request(request, has_image=False)
        await self._load_models(request)
        return await self._timed(self._read_query(request, text))

    @asynccontextmanager
    async def _room_for(self, image: bytes, urgency: Urgency) -> AsyncIterator[None]:
        """Hold one giant picture at a time: one of 13000x13000 pixels takes 1.2 GB.

        Raises:
            Busy: there is one; to wait for it here would keep a place from other requests.
        """
        pixels = await self._pictures.count_pixels(image, urgency)
        if pixels is None or pixels <= self._giant_pixels:
            yield
            return
        if self._giants.locked():
            raise Busy("another giant picture is being worked on")
        async with self._giants:
            yield

    async def _decode(self, image: bytes, urgency: Urgency) -> Picture:
        with self._metrics.stage("image", "decode"):
            return await self._pictures.get(image, urgency)

    async def _load_models(self, request: TaskRequest) -> None:
        """Fetch and load all models side by side, however long it takes: the caller waits."""
        await _all(self._models.get(key) for key in model_keys(request) if self._models.serves(key))

    async def _timed(self, work: Coroutine[None, None, Answer]) -> Answer:
        limit = asyncio.timeout(self._timeout_s)
        try:
            async with limit:
                return await work
        except TimeoutError as exc:
            if not limit.expired():  # not ours: a library's own
                raise
            raise TimedOut(f"no answer within {self._timeout_s:g} s") from exc

    async def _read_query(self, request: TaskRequest, text: str) -> Answer:
        query = request.clip_textual
        assert query is not None, "checked"
        item = SearchQuery(text, query.language)
        return Answer(clip=await self._models.run(query.model, item))

    async def _look(self, request: TaskRequest, picture: Picture) -> Answer:
        clip = asyncio.create_task(self._embed(request, picture))
        faces = asyncio.create_task(
            self._find_faces(request.face_detection, request.face_recognition, picture)
        )
        text = asyncio.create_task(
            self._find_text(request.text_detection, request.text_recognition, picture)
        )
        await _all((clip, faces, text))
        return Answer(
            size=picture.size, clip=clip.result(), faces=faces.result(), text=text.result()
        )

    async def _embed(self, request: TaskRequest, picture: Picture) -> Floats | None:
        if request.clip_visual is None:
            return None
        vector: Floats = await self._models.run(request.clip_visual.model, picture)
        return vector

    async def _find_faces(
        self,
        detection: FaceDetection | None,
        recognition: FaceRecognition | None,
        picture: Picture,
    ) -> Faces | RecognisedFaces | None:
        if detection is None:
            return None
        faces: Faces = await self._models.run(
            detection.model, FaceQuery(picture, detection.min_score)
        )
        self._metrics.faces.inc(len(faces))
        if recognition is None:
            return faces
        vectors: list[Floats] = await self._run_each(
            recognition.model, [FaceCrop(picture, landmarks) for landmarks in faces.landmarks]
        )
        empty = np.empty((0, FACE_VECTOR_DIM), dtype=np.float32)
        return RecognisedFaces(faces, np.stack(vectors) if vectors else empty)

    async def _find_text(
        self,
        detection: TextDetection | None,
        recognition: TextRecognition | None,
        picture: Picture,
    ) -> TextRegions | TextLines | None:
        if detection is None:
            return None
        query = TextRegionQuery(picture, detection.min_score, detection.max_resolution)
        regions: TextRegions = await self._models.run(detection.model, query)
        if recognition is None:
            return regions
        readings: Iterable[Reading] = (
            regions.readings
            if regions.readings is not None
            else await self._run_each(
                recognition.model, [LineCrop(picture, quad) for quad in regions.quads]
            )
        )
        lines = keep_lines(
            regions, list(readings), size=picture.size, min_score=recognition.min_score
        )
        self._metrics.text_lines.inc(len(lines.texts))
        return lines

    async def _run_each(self, key: ModelKey, items: Sequence[Any]) -> list[Any]:
        """Run every item, so many at a time that other requests get their turns between them.

        Any: what goes in and out is the model's own.
        """
        room = asyncio.Semaphore(ITEMS_AT_ONCE)

        async def run(item: Any) -> Any:
            async with room:
                return await self._models.run(key, item)

        return await _all(run(item) for item in items)


def keep_lines(
    regions: TextRegions, readings: list[Reading], *, size: tuple[int, int], min_score: float
) -> TextLines:
    """The lines read with a score strictly above `min_score`, boxes in 0..1 of `size`."""
    scores = np.array([reading.score for reading in readings], dtype=np.float32)
    kept = np.flatnonzero(scores > np.float32(min_score))
    return TextLines(
        quads=(regions.quads[kept] / np.array(size)).astype(np.float32),
        box_scores=regions.scores[kept],
        texts=tuple(readings[row].text for row in kept),
        text_scores=scores[kept],
    )


def model_keys(request: TaskRequest) -> list[ModelKey]:
    """Every model a request names."""
    entries = (
        request.clip_visual,
        request.clip_textual,
        request.face_detection,
        request.face_recognition,
        request.text_detection,
        request.text_recognition,
    )
    return [entry.model for entry in entries if entry is not None]


def urgency_of_tasks(request: TaskRequest) -> Urgency:
    """The class of what a request's tasks share: that of the most urgent."""
    urgencies = (urgency_of(key.task, key.part) for key in model_keys(request))
    return min(urgencies, default=Urgency.PICTURES)


def _check_request(request: TaskRequest, *, has_image: bool) -> None:
    """Refuse a task whose payload or detection is missing, before any model is loaded for it."""
    for key in model_keys(request):
        if (key == getattr(request.clip_textual, "model", None)) == has_image:
            needed, sent = ("text", "an image") if has_image else ("image", "a text")
            raise MissingPayload(f"{key.task} {key.part} needs {needed}, the request has {sent}")
    for recognition, detection in (
        (request.face_recognition, request.face_detection),
        (request.text_recognition, request.text_detection),
    ):
        if recognition is not None and detection is None:
            task = recognition.model.task
            raise MissingDependency(
                f"{task} recognition depends on output of (detection, {task}), which is not asked"
            )


async def _all(work: Iterable[Awaitable[T]]) -> list[T]:
    """Await everything, then raise the first error: no work is left running behind an answer."""
    results = await asyncio.gather(*work, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return [result for result in results if not isinstance(result, BaseException)]
