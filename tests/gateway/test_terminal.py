"""What `serve` tells the person at its terminal."""

import asyncio
import io
import logging
from pathlib import Path

import pytest

from immich_ml_metal.gateway.history import History
from immich_ml_metal.gateway.terminal import Teller, first_lines, progress
from immich_ml_metal.settings import Settings

PICTURE = b'{"clip":{"visual":{"modelName":"m"}}}'
SEARCH = b'{"clip":{"textual":{"modelName":"m"}}}'
TEXT = b'{"ocr":{"detection":{"modelName":"m"}}}'
NONE: dict[str, list[str]] = {"clip": [], "facial-recognition": [], "ocr": []}
USUAL = {
    "clip": ["ViT-B-32__openai"],
    "facial-recognition": ["buffalo_l"],
    "ocr": ["PP-OCRv5_mobile"],
}
URLS = ["http://192.0.2.7:3003"]

pytestmark = pytest.mark.anyio


def test_the_three_lines_name_the_address_the_page_and_the_downloads() -> None:
    immich, page, models = first_lines(Settings(), URLS, {**NONE, "clip": ["ViT-B-32__openai"]})
    assert immich.endswith("Machine Learning Settings > URL: http://192.0.2.7:3003")
    assert "http://192.0.2.7:3003 in a browser" in page
    assert "buffalo_l (" in models
    assert "PP-OCRv5_mobile (" in models
    assert "ViT-B-32__openai" not in models


def test_the_third_line_says_when_nothing_will_be_downloaded() -> None:
    assert "nothing to download" in first_lines(Settings(), URLS, USUAL)[2]
    assert "offline is set" in first_lines(Settings(offline=True), URLS, NONE)[2]


def test_a_minute_of_an_import_is_one_line() -> None:
    history = History()
    before = history.copy_totals()
    for _ in range(6):
        history.note(PICTURE, 200, 0.1)
    history.note(TEXT, 200, 0.1)
    history.note(TEXT, 500, 0.1)
    line = (
        "import: photos done search 6, faces 0, text 1; now 0.1 per s, 1 failed in the last minute"
    )
    assert progress(before, history.copy_totals(), 60.0) == line


def test_a_minute_without_photos_is_silent() -> None:
    history = History()
    before = history.copy_totals()
    history.note(SEARCH, 200, 0.1)
    assert progress(before, history.copy_totals(), 60.0) is None


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


async def test_a_terminal_is_told_once_the_worker_is_up_and_a_log_only_of_imports(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    terminal, history, up = Terminal(), History(), asyncio.Event()
    monkeypatch.setattr("sys.stdout", terminal)
    settings = Settings(models_dir=tmp_path, host="192.0.2.7")
    teller = Teller(settings, history, is_up=up.is_set, port=lambda: 3004, minute_s=0.05)
    with caplog.at_level(logging.INFO):
        telling = asyncio.create_task(teller.run())
        await asyncio.sleep(0.3)
        assert terminal.getvalue() == ""
        up.set()
        async with asyncio.timeout(5):
            while "3004" not in terminal.getvalue():
                await asyncio.sleep(0.05)
            await asyncio.sleep(0.15)
            assert "import:" not in caplog.text
            history.note(PICTURE, 200, 0.1)
            while "import: photos done search 1" not in caplog.text:
                await asyncio.sleep(0.02)
        telling.cancel()


async def test_without_a_terminal_nothing_is_printed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pipe = io.StringIO()
    monkeypatch.setattr("sys.stdout", pipe)
    settings = Settings(models_dir=tmp_path)
    teller = Teller(settings, History(), is_up=lambda: True, port=lambda: 1, minute_s=0.05)
    telling = asyncio.create_task(teller.run())
    await asyncio.sleep(0.4)
    telling.cancel()
    assert pipe.getvalue() == ""
