"""Real servers on loopback for the length of a block, and the calls that tests make to them."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import uvicorn
from doubles.tiny_models import CLIP, FACES, OCR

START_TIMEOUT_S = 20.0

VISUAL = {"clip": {"visual": {"modelName": CLIP}}}
TEXTUAL = {"clip": {"textual": {"modelName": CLIP, "options": {"language": "en"}}}}


def face_entries(min_score: float = 0.7, model: str = FACES) -> dict[str, Any]:
    detection = {"modelName": model, "options": {"minScore": min_score}}
    return {"facial-recognition": {"detection": detection, "recognition": {"modelName": model}}}


def text_entries(
    min_score: float = 0.5, max_resolution: int = 736, line_score: float = 0.8, model: str = OCR
) -> dict[str, Any]:
    options = {"minScore": min_score, "maxResolution": max_resolution}
    line = {"modelName": model, "options": {"minScore": line_score}}
    return {"ocr": {"detection": {"modelName": model, "options": options}, "recognition": line}}


ALL = VISUAL | face_entries() | text_entries()


@contextlib.contextmanager
def serve(app: Any, **options: Any) -> Iterator[str]:
    """Run an ASGI app with its lifespan on a free port; gives its URL."""
    config = uvicorn.Config(app, log_config=None, access_log=False, ws="none", **options)
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as sock:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
        thread.start()
        deadline = time.monotonic() + START_TIMEOUT_S
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            assert time.monotonic() < deadline, "the server takes too long to start"
            time.sleep(0.005)
        try:
            yield f"http://127.0.0.1:{sock.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(START_TIMEOUT_S)
            assert not thread.is_alive(), "the server did not stop"


def predict(
    url: str, entries: Any, *, image: bytes | None = None, text: str | None = None
) -> httpx.Response:
    """One `/predict` as Immich sends it."""
    fields = {"entries": entries if isinstance(entries, str) else json.dumps(entries)}
    if text is not None:
        fields["text"] = text
    files = None
    if image is not None:
        files = {"image": ("blob", image, "application/octet-stream")}
    return httpx.post(f"{url}/predict", data=fields, files=files, timeout=60)


def numbers(vector: str) -> list[float]:
    """The numbers of an embedding, which travels as a string."""
    assert isinstance(vector, str)
    values: list[float] = json.loads(vector)
    return values
