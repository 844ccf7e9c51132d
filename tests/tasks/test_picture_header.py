"""What a file says before it is decoded, and what is refused there because it would take long."""

import struct
from collections.abc import Callable

import pytest
from doubles.pictures import chunk, encode
from doubles.timing import work_of_at_most
from PIL import Image

from immich_ml_metal.errors import ImageTooLarge, InvalidImage
from immich_ml_metal.tasks import picture_header as walk
from immich_ml_metal.tasks.images import ImageLimits, count_pixels, decode
from immich_ml_metal.tasks.picture_header import Header, read_header

LIMITS = ImageLimits()


def sample(file_format: str, size: tuple[int, int] = (40, 24), **options: object) -> bytes:
    return encode(Image.radial_gradient("L").resize(size).convert("RGB"), file_format, **options)


COMMON = {
    "JPEG": sample("JPEG"),
    "progressive JPEG": sample("JPEG", progressive=True),
    "PNG": sample("PNG"),
    "GIF": sample("GIF"),
    "lossy WebP": sample("WEBP"),
    "lossless WebP": sample("WEBP", lossless=True),
    "WebP with an ICC profile": sample("WEBP", icc_profile=b"x" * 128),
}


@pytest.mark.parametrize("name", COMMON)
def test_the_formats_that_immich_sends_tell_their_size(name: str) -> None:
    header = read_header(COMMON[name])
    assert header.is_common
    assert (header.size, count_pixels(COMMON[name])) == ((40, 24), 40 * 24)
    assert decode(COMMON[name], LIMITS).size == (40, 24)


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (sample("TIFF"), "TIFF"),
        (sample("BMP"), "BMP"),
        (sample("ICO"), "ICO"),
        (sample("AVIF"), "AVIF"),
        (sample("JPEG2000"), "JPEG 2000"),
        (sample("QOI"), "QOI"),
        (sample("PPM"), "Netpbm"),
        (b"\0\0\0\x18ftypheic\0\0", "HEIF"),
        (b"\0\0\0\x18ftypisom\0\0", "ISO media"),
        (b"8BPS\0\1", "PSD"),
        (b"\xff\x0a\xfa", "JPEG XL"),
        (b"%PDF-1.4", "PDF"),
    ],
)
def test_every_other_format_is_refused_with_its_name(data: bytes, name: str) -> None:
    assert read_header(data) == Header(name)
    assert count_pixels(data) is None
    with pytest.raises(InvalidImage, match=f"^{name} pictures are not decoded here"):
        decode(data, LIMITS)


@pytest.mark.parametrize("name", COMMON)
def test_a_header_that_breaks_off_is_left_to_the_decoder(name: str) -> None:
    for length in range(1, 40):
        data = COMMON[name][:length]
        assert (count_pixels(data) or 0) <= 40 * 24
        with pytest.raises(InvalidImage):
            decode(data, LIMITS)


@pytest.mark.parametrize("size", [(13_378, 13_378), (65_536, 40)])
def test_a_picture_over_the_limits_asks_for_no_room(size: tuple[int, int]) -> None:
    png = bytearray(COMMON["PNG"])
    png[16:24] = struct.pack(">II", *size)
    assert count_pixels(bytes(png)) == 0
    with pytest.raises(ImageTooLarge):
        decode(bytes(png), ImageLimits())


def test_the_largest_picture_asks_for_room() -> None:
    png = bytearray(COMMON["PNG"])
    png[16:24] = struct.pack(">II", 13_377, 13_377)
    assert count_pixels(bytes(png)) == 13_377**2


def test_a_gif_whose_frame_is_larger_than_its_screen_tells_what_is_decoded() -> None:
    gif = bytearray(sample("GIF"))
    gif[6:10] = struct.pack("<HH", 1, 1)
    assert read_header(bytes(gif)).size == (40, 24)


# -- limits, at both sides -------------------------------------------------------------------------


def jpeg_with(segments: int = 0, metadata: int = 0, junk: int = 0, scans: int = 0) -> bytes:
    plain = sample("JPEG", progressive=True)
    more = b"\xff\xfe\0\2" * segments + (b"\xff\xe5\x80\0" + bytes(0x7FFE)) * (metadata // 0x8000)
    scan = plain[plain.index(b"\xff\xda") : -2]
    return plain[:20] + more + bytes(junk) + plain[20:-2] + scan * scans + plain[-2:]


def jpeg_with_junk_in_two_places(count: int) -> bytes:
    plain = sample("JPEG", progressive=True)
    first = count // 2
    return plain[:20] + bytes(first) + b"\xff\xfe\0\2" + bytes(count - first) + plain[20:]


def read_segments(jpeg: bytes) -> int:
    """Segments up to the first scan, that one included."""
    at, count = 2, 1
    while jpeg[at + 1] != 0xDA:
        at += 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
        count += 1
    return count


def png_with(side: int = 0, tiny: int = 0) -> bytes:
    plain = COMMON["PNG"]
    at = plain.index(b"IDAT") - 4
    return plain[:at] + chunk(b"teXt") * side + chunk(b"IDAT") * tiny + plain[at:]


def gif_with(blocks: int = 0, junk: int = 0) -> bytes:
    plain = COMMON["GIF"]
    at = 13 + (3 << ((plain[10] & 7) + 1))
    comment = b"!\xfe" + b"\1x" * blocks + b"\0"
    return plain[:at] + bytes(junk) + comment + plain[at:]


PLAIN_SEGMENTS = read_segments(sample("JPEG", progressive=True))


@pytest.mark.parametrize(
    ("make", "most"),
    [
        (lambda n: jpeg_with(junk=n), walk.MAX_JUNK_BYTES),
        (jpeg_with_junk_in_two_places, walk.MAX_JUNK_BYTES),
        (lambda n: jpeg_with(metadata=n * 0x8000), walk.MAX_METADATA_BYTES // 0x8000 - 1),
        (lambda n: jpeg_with(segments=n), walk.MAX_SEGMENTS - PLAIN_SEGMENTS),
        (lambda n: png_with(side=n), walk.MAX_SIDE_CHUNKS - 2),
        (lambda n: png_with(tiny=n), 2000 + 24 - 3),
        (lambda n: gif_with(blocks=n), walk.MAX_SUB_BLOCKS),
        (lambda n: gif_with(junk=n), walk.MAX_JUNK_BYTES),
    ],
    ids=[
        "junk",
        "junk in two places",
        "metadata",
        "segments",
        "chunks",
        "tiny chunks",
        "blocks",
        "gif junk",
    ],
)
def test_a_structure_that_takes_long_is_refused_and_one_on_the_limit_is_not(
    make: Callable[[int], bytes], most: int
) -> None:
    assert read_header(make(most)).size == (40, 24)
    with pytest.raises(InvalidImage, match="over "):
        read_header(make(most + 1))


def test_scans_are_counted_exactly_and_only_within_the_picture() -> None:
    scans = jpeg_with().count(b"\xff\xda")
    most = jpeg_with(scans=(walk.MAX_SCANS - scans) // scans)
    assert read_header(most).size == (40, 24)
    assert read_header(most + b"\xff\xda" * 1000).size == (40, 24)  # a film behind it
    with pytest.raises(InvalidImage, match="scans"):
        read_header(jpeg_with(scans=walk.MAX_SCANS // scans + 1))


PNG_HEAD = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", bytes(13))


@pytest.mark.parametrize(
    ("head", "filling", "count"),
    [
        (b"\xff\xd8", b"\xff", 30_000_000),
        (b"\xff\xd8\xff\xe0", b"\0", 30_000_000),
        (b"\xff\xd8", b"\xff\xfe\0\2", 8_000_000),
        (b"\xff\xd8", b"\xff\xfe\0\0", 8_000_000),
        (b"\xff\xd8\xff", b"\0", 30_000_000),
        (COMMON["progressive JPEG"][:-2], b"\xff\xda\0\0", 8_000_000),
        (COMMON["progressive JPEG"][:-2], b"\xff", 30_000_000),
        (PNG_HEAD, chunk(b"abcd"), 2_500_000),
        (PNG_HEAD, chunk(b"IDAT"), 2_500_000),
        (COMMON["GIF"][:13], b"\0", 30_000_000),
        (COMMON["GIF"][:10] + b"\0\0\0", b"!\xfe\0", 10_000_000),
        (COMMON["GIF"][:10] + b"\0\0\0!\xfe", b"\1x", 15_000_000),
        (b"RIFF\0\0\0\0WEBPVP8X", b"\0", 30_000_000),
    ],
    ids=range(13),
)
def test_no_filling_takes_long(head: bytes, filling: bytes, count: int) -> None:
    data = head + filling * count
    with work_of_at_most(1.5), pytest.raises((InvalidImage, ImageTooLarge)):
        decode(data, LIMITS)


@pytest.mark.parametrize("name", COMMON)
def test_an_ordinary_preview_is_walked_in_next_to_no_time(name: str) -> None:
    file_format = {"p": "JPEG", "l": "WEBP", "W": "WEBP"}.get(name[0], name)
    data = sample(file_format, (1440, 1080))
    with work_of_at_most(20 * 0.002):
        for _ in range(20):
            read_header(data)
