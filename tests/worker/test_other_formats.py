"""Pictures of rare formats, in a child that is really ended."""

import asyncio
import struct
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
from doubles.live import VISUAL, predict, serve
from doubles.pictures import encode
from PIL import Image

from immich_ml_metal.errors import Busy, ImageTooLarge, InvalidImage
from immich_ml_metal.settings import Settings
from immich_ml_metal.worker import other_formats_child
from immich_ml_metal.worker.compose import build_app
from immich_ml_metal.worker.other_formats import OtherFormats


@pytest.fixture
def others() -> Iterator[OtherFormats]:
    others = OtherFormats()
    yield others
    others.close()


def tiff_of_tiny_tiles(side: int) -> bytes:
    """Grey, of 1x1 tiles that all lie at one place: four bytes and 5 us of decoding a pixel."""
    tiles = side * side
    data_at = 8 + 2 + 12 * 10 + 4
    offsets_at, counts_at = data_at + 16, data_at + 16 + 2 * tiles
    longs = ((256, side), (257, side), (322, 1), (323, 1))
    shorts = ((258, 8), (259, 1), (262, 1), (277, 1))
    entries = [(tag, struct.pack("<HHII", tag, 4, 1, value)) for tag, value in longs]
    entries += [(tag, struct.pack("<HHIHH", tag, 3, 1, value, 0)) for tag, value in shorts]
    entries += [(324, struct.pack("<HHII", 324, 3, tiles, offsets_at))]
    entries += [(325, struct.pack("<HHII", 325, 3, tiles, counts_at))]
    directory = b"".join(entry for _, entry in sorted(entries))
    head = b"II*\0" + struct.pack("<IH", 8, 10) + directory + bytes(4) + b"\x80" * 16
    return head + struct.pack("<H", data_at) * tiles + struct.pack("<H", 1) * tiles


def icon_that_holds(width: int, height: int) -> bytes:
    """An icon that says 16x16 and holds a larger PNG."""
    inner = encode(Image.new("1", (width, height)), "PNG")
    entry = struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(inner), 22)
    return struct.pack("<HHH", 0, 1, 1) + entry + inner


def children() -> int:
    return len(psutil.Process().children())


@pytest.mark.parametrize("file_format", ["TIFF", "BMP", "QOI", "PPM", "TGA"])
async def test_a_rare_format_has_its_pixels(others: OtherFormats, file_format: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (600, 33, 3), dtype=np.uint8)
    picture = await others.decode(encode(Image.fromarray(pixels), file_format))
    np.testing.assert_array_equal(picture.pixels, pixels)


async def test_a_refusal_of_the_child_is_ours(others: OtherFormats) -> None:
    with pytest.raises(InvalidImage, match="unknown format"):
        await others.decode(b"nothing that is known")
    with pytest.raises(ImageTooLarge, match="over 178956970 pixels"):
        await others.decode(icon_that_holds(21_000, 17_000))


async def test_a_decoder_that_takes_too_long_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    others = OtherFormats(wall_limit_s=1.0)
    with pytest.raises(InvalidImage, match="cannot be decoded within 1 s"):
        await others.decode(tiff_of_tiny_tiles(2500))
    assert children() == 0
    others.close()


async def test_the_system_ends_a_decoder_that_nobody_watches() -> None:
    limit = "import immich_ml_metal.worker.other_formats_child as c; c.CPU_LIMIT_S = 1; c.main()"
    others = OtherFormats(command=(sys.executable, "-c", limit), wall_limit_s=1e9)
    with pytest.raises(InvalidImage, match="cannot be decoded within"):
        await others.decode(tiff_of_tiny_tiles(2500))
    others.close()


async def test_a_decoder_that_takes_too_much_memory_is_ended() -> None:
    greedy = "import time\nheld = b'x' * 300_000_000\ntime.sleep(60)"
    others = OtherFormats(command=(sys.executable, "-c", greedy), memory_limit_bytes=100_000_000)
    with pytest.raises(InvalidImage, match="too much memory"):
        await others.decode(b"")
    assert children() == 0
    others.close()


async def test_the_child_limits_its_own_memory_where_the_system_keeps_limits() -> None:
    if sys.platform == "darwin":
        assert other_formats_child.MEMORY_LIMIT_BYTES > 0  # macOS: the parent looks
        return
    small = (
        "import immich_ml_metal.worker.other_formats_child as c\n"
        "c.MEMORY_LIMIT_BYTES = 700_000_000\nc.main()"
    )
    others = OtherFormats(command=(sys.executable, "-c", small))
    with pytest.raises(InvalidImage, match="memory"):
        await others.decode(encode(Image.new("L", (13_000, 13_000)), "TIFF"))
    others.close()


async def test_a_decoder_that_ends_without_a_word_is_told() -> None:
    others = OtherFormats(command=(sys.executable, "-c", "import os; os._exit(9)"))
    with pytest.raises(InvalidImage, match="ended with status 9"):
        await others.decode(b"x" * 1_000_000)
    others.close()


async def test_who_comes_meanwhile_is_asked_to_come_again(others: OtherFormats) -> None:
    first = asyncio.create_task(others.decode(encode(Image.new("RGB", (8, 8)), "TIFF")))
    await asyncio.sleep(0)
    with pytest.raises(Busy, match="rare format"):
        await others.decode(b"")
    assert (await first).size == (8, 8)
    assert (await others.decode(encode(Image.new("RGB", (9, 8)), "TIFF"))).size == (9, 8)


def test_a_service_that_allows_rare_formats_takes_one_at_a_time(models: Path) -> None:
    settings = Settings(models_dir=models, offline=True, decode_other_formats=True)
    slow, quick = tiff_of_tiny_tiles(1000), encode(Image.new("RGB", (64, 64)), "TIFF")
    with serve(build_app(settings)) as url, ThreadPoolExecutor(1) as elsewhere:
        assert predict(url, VISUAL, image=quick).status_code == 200
        first = elsewhere.submit(lambda: predict(url, VISUAL, image=slow))
        answers = [predict(url, VISUAL, image=quick + bytes(1))]
        while not (first.done() or answers[-1].status_code == 503):
            answers.append(predict(url, VISUAL, image=quick + bytes(len(answers) + 1)))
        put_off = [*answers, first.result()]  # whichever of the two came second
        (answer, *_) = [one for one in put_off if one.status_code == 503]
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert "rare format" in answer.json()["detail"]
