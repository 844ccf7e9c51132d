"""The running service against the recorded answers of the official one, and as its real client."""

import asyncio
import io
import itertools
import json
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import httpx
import pytest
from doubles.live import TEXTUAL, VISUAL, face_entries, numbers, predict, text_entries
from doubles.shared_models import OTHER_FACES
from PIL import Image

from immich_ml_metal.client.own_service import running_service

pytestmark = [pytest.mark.shared, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def url(shared_models: Path) -> Iterator[str]:
    """The real `serve` process on the shared models."""
    with running_service({"--models-dir": str(shared_models), "--log-level": "warning"}) as child:
        yield child.url


def test_the_service_conforms_to_the_recorded_answers(shared: Path, url: str) -> None:
    tool = shared / "tools" / "conform.py"
    done = subprocess.run(
        [sys.executable, tool, "--url", url, "--cosine", "0.99999"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lowest = dict(re.findall(r"lowest ([\w ]+?) ([\d.]+)", done.stdout))
    assert set(lowest) == {"clip cosine", "text cosine", "face cosine", "ocr lines found"}
    assert float(lowest.pop("ocr lines found")) >= 0.9
    assert min(map(float, lowest.values())) >= 0.99999
    assert ", 0 failed" in done.stdout


# -- the real client -------------------------------------------------------------------------------


def exchange(sock: socket.socket, raw: bytes) -> tuple[int, bytes]:
    """Send raw bytes, read one answer; the connection stays open, as Node keeps it."""
    sock.sendall(raw)
    with sock.makefile("rb") as lines:
        status = int(lines.readline().split()[1])
        length = 0
        while (line := lines.readline().strip()) != b"":
            name, _, value = line.partition(b":")
            if name.lower() == b"content-length":
                length = int(value)
        return status, lines.read(length)


def test_the_bytes_of_a_real_client_are_understood_on_one_connection(
    shared: Path, url: str
) -> None:
    address = urlparse(url)
    place = (str(address.hostname), int(address.port or 0))
    answers: dict[str, bytes] = {}
    with socket.create_connection(place, timeout=60) as sock:
        for _, file in itertools.product(range(2), sorted((shared / "wire").glob("*.http"))):
            status, body = exchange(sock, file.read_bytes())
            assert status == 200, (file.name, body[:200])
            assert answers.setdefault(file.stem, body) == body
    assert answers.pop("ping") == b"pong"
    parsed = {name: json.loads(body) for name, body in answers.items()}
    assert len(numbers(parsed["clip_visual"]["clip"])) == 512
    assert len(numbers(parsed["clip_textual"]["clip"])) == 512
    assert isinstance(parsed["faces"]["facial-recognition"], list)
    assert set(parsed["ocr"]["ocr"]) == {"box", "text", "boxScore", "textScore"}


def test_a_live_node_client_gets_its_four_answers(shared: Path, url: str) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    script, image = shared / "tools" / "immich_client.mjs", shared / "images" / "portrait.jpg"
    done = subprocess.run([node, script, url, image], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[:2] for line in lines] == [
        ["ping", "true"],
        ["encodeImage", "200"],
        ["encodeText", "200"],
        ["detectFaces", "200"],
        ["ocr", "200"],
    ]


# -- side by side ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ask:
    """One request, and what to do with its answer: nothing but compare it."""

    entries: dict[str, Any]
    image: str | None = None
    text: str | None = None


MIX = (
    Ask(VISUAL, "portrait.jpg"),
    Ask(VISUAL, "preview_beer.jpg"),
    Ask(TEXTUAL, text="a photo of a dog"),
    Ask(TEXTUAL, text="Grüße aus dem Süden"),
    Ask(face_entries(0.7), "faces_group.jpg"),
    Ask(face_entries(0.3), "preview_beer.jpg"),
    Ask(face_entries(0.7, OTHER_FACES), "preview_beer.jpg"),
    Ask(face_entries(0.3, OTHER_FACES), "preview_beer.jpg"),
    Ask(face_entries(0.5), "portrait.jpg"),
    Ask(text_entries(0.5, 736), "preview_book_portrait.jpg"),
    Ask(text_entries(0.3, 320), "preview_book_portrait.jpg"),
    Ask(text_entries(0.7, 480, 0.95), "preview_book_portrait.jpg"),
    Ask(text_entries(0.5, 736, 0.3), "preview_beer.jpg"),
    Ask(VISUAL | face_entries(0.4) | text_entries(0.4, 640), "portrait.jpg"),
    Ask(VISUAL, "bad_truncated.jpg"),
    Ask({"clip": {"visual": {"modelName": "ViT-B-33__openai"}}}, "portrait.jpg"),
)


def test_sixteen_clients_at_once_get_exactly_what_they_get_alone(shared: Path, url: str) -> None:
    pictures = {ask.image: (shared / "images" / ask.image).read_bytes() for ask in MIX if ask.image}
    alone = []
    for ask in MIX:
        image = pictures[ask.image] if ask.image else None
        answer = predict(url, ask.entries, image=image, text=ask.text)
        alone.append((answer.status_code, answer.content))
    assert [status for status, _ in alone] == [200] * 14 + [400, 422]
    assert len({body for _, body in alone}) == len(MIX), "options or models make no difference"

    async def send(client: httpx.AsyncClient, row: int) -> None:
        for turn in range(3):
            number = (5 * turn + row) % len(MIX)
            ask = MIX[number]
            if alone[number][0] == 422 and turn:
                continue  # a name that is not served: the third in a row is held, to save a queue
            fields = {"entries": json.dumps(ask.entries)} | ({"text": ask.text} if ask.text else {})
            files = {"image": ("blob", pictures[ask.image])} if ask.image else None
            answer = await client.post(f"{url}/predict", data=fields, files=files)
            assert (answer.status_code, answer.content) == alone[number], ask

    async def rush() -> None:
        limits = httpx.Limits(max_connections=16)
        async with httpx.AsyncClient(limits=limits, timeout=200) as client:
            await asyncio.gather(*(send(client, row) for row in range(16)))

    asyncio.run(rush())


# -- hostile pictures ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "status", "words"),
    [
        ("bad_empty.jpg", 400, "empty"),
        ("bad_text.jpg", 400, "unknown format"),
        ("bad_truncated.jpg", 400, "truncated"),
        ("odd_1x200.png", 200, ""),
        ("odd_200x3.png", 200, ""),
        ("odd_20x20.png", 200, ""),
        ("odd_animated.gif", 200, ""),
        ("odd_cmyk.jpg", 200, ""),
        ("odd_gray.png", 200, ""),
        ("odd_gray16.png", 200, ""),
        ("odd_palette.gif", 200, ""),
        ("odd_panorama.jpg", 200, ""),
        ("odd_rgba.png", 200, ""),
        ("odd_webp.webp", 200, ""),
        ("portrait_exif6.jpg", 200, ""),
        ("blank_black.jpg", 200, ""),
    ],
)
def test_an_odd_picture_gets_its_documented_answer_from_every_task(
    shared: Path, url: str, image: str, status: int, words: str
) -> None:
    content = (shared / "images" / image).read_bytes()
    for entries in (VISUAL, face_entries(), text_entries()):
        answer = predict(url, entries, image=content)
        assert answer.status_code == status
        if status == 200:
            with Image.open(io.BytesIO(content)) as opened:
                width, height = opened.size
            assert (answer.json()["imageWidth"], answer.json()["imageHeight"]) == (width, height)
        else:
            assert words in answer.json()["detail"]


def test_a_picture_too_small_for_text_has_none(shared: Path, url: str) -> None:
    for image in ("odd_1x200.png", "odd_200x3.png", "odd_20x20.png"):
        answer = predict(url, text_entries(), image=(shared / "images" / image).read_bytes())
        assert answer.json()["ocr"] == {"box": [], "text": [], "boxScore": [], "textScore": []}
