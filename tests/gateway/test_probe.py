"""What a try of our own asks for, read as the worker reads it."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from immich_ml_metal.gateway.body import Body
from immich_ml_metal.gateway.client import WorkerAnswer
from immich_ml_metal.gateway.probe import Prober
from immich_ml_metal.gateway.troubles import Troubles
from immich_ml_metal.types import Task
from immich_ml_metal.worker.form import split_form
from immich_ml_metal.worker.wire import parse_entries


class Recorder:
    """Stands where the dispatcher stands, keeps what is sent, and answers 503."""

    def __init__(self) -> None:
        self.sent: list[tuple[bytes, str]] = []

    def submit(self, body: Body, content_type: bytes, request_id: str, *, kind: Any) -> Any:
        self.sent.append((body.head, content_type.decode()))
        answer = asyncio.get_running_loop().create_future()
        answer.set_result(WorkerAnswer(status=503))
        return SimpleNamespace(answer=answer)

    def withdraw(self, job: Any) -> None: ...


@pytest.mark.parametrize(
    ("task", "model", "asked"),
    [
        (Task.CLIP, "ViT-B-32__openai", {"clip_visual"}),
        (Task.FACES, "buffalo_s", {"face_detection", "face_recognition"}),
        (Task.OCR, "PP-OCRv6_tiny", {"text_detection", "text_recognition"}),
    ],
)
async def test_a_try_asks_for_every_half_that_a_picture_needs(
    task: Task, model: str, asked: set[str]
) -> None:
    recorder = Recorder()
    dispatcher: Any = recorder
    told = await Prober(dispatcher, Troubles(10**6)).probe(task, model)
    assert told == "a try of our own was answered 503"
    ((body, content_type),) = recorder.sent
    form = split_form(body, content_type, limit_bytes=10**6)
    request = parse_entries(form.entries, face_min_score=0.7)
    assert {name for name in request.__slots__ if getattr(request, name)} == asked
