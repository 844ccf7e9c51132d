"""What a picture's file says before anything is decoded: its format, its size, its structure.

Pillow reads some structures byte by byte, or decodes a picture once for each scan that a file
announces: a small file may take minutes. Here the four formats that Immich sends are walked first,
with limits that no picture met in the wild comes near. Everything else is only named.
"""

import re
import struct
from dataclasses import dataclass

from immich_ml_metal.errors import InvalidImage

MAX_SEGMENTS = 1000  # of a JPEG, before its pixels
MAX_METADATA_BYTES = 16 * 2**20
MAX_SCANS = 100  # progressive encoders write about ten
MAX_SCAN_PIXELS = 2_500_000_000  # pixels times scans: the largest picture with fourteen
MAX_SIDE_CHUNKS = 256  # of a PNG, beside its pixels
MAX_SUB_BLOCKS = 4096  # of a GIF, before its pixels
MAX_JUNK_BYTES = 64 * 1024  # between the parts of a file, which Pillow skips one by one

_NEXT_MARKER = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])")  # neither data nor a restart
_FILL = b"\xff" * 4096
_NO_FRAME = frozenset({0xC4, 0xC8, 0xCC})  # of 0xC0 to 0xCF: tables
_STANDALONE = frozenset({0x01, *range(0xD0, 0xDA)})  # markers without a length
_METADATA = frozenset({*range(0xE0, 0xF0), 0xFE})

_BRANDS = {
    **dict.fromkeys((b"avif", b"avis"), "AVIF"),
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1"), "HEIF"),
}
_STARTS = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
    (b"BM", "BMP"),
    (b"\0\0\1\0", "ICO"),
    (b"\0\0\2\0", "ICO"),
    (b"icns", "ICNS"),
    (b"8BPS", "PSD"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"\xff\x0a", "JPEG XL"),
    (b"%!PS", "PostScript"),
    (b"%PDF", "PDF"),
    (b"DDS ", "DDS"),
    (b"qoif", "QOI"),
)
_NETPBM = re.compile(rb"P[1-7fF]\s")


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says of itself.

    Attributes:
        format: Pillow's name for JPEG, PNG, GIF and WEBP, ours for others, "" for what is unknown.
        size: (width, height) in pixels of all that will be decoded, None where the file breaks off
            before it, and for other formats.
    """

    format: str
    size: tuple[int, int] | None = None

    @property
    def is_common(self) -> bool:
        """Whether it is one of the formats that are decoded in this process."""
        return self.format in _WALKS


def read_header(data: bytes) -> Header:
    """Read what comes before the pixels.

    Raises:
        InvalidImage: a structure that would take long to read.
    """
    name = _name(data)
    if name not in _WALKS:
        return Header(name)
    try:
        return Header(name, _WALKS[name](data))
    except (IndexError, struct.error):  # it breaks off, which the decoder will explain
        return Header(name)


def _name(data: bytes) -> str:
    if data.startswith(b"RIFF"):
        return "WEBP" if data[8:12] == b"WEBP" else "RIFF"
    if data[4:8] == b"ftyp":
        return _BRANDS.get(data[8:12], "ISO media")
    if _NETPBM.match(data):
        return "Netpbm"
    return next((name for start, name in _STARTS if data.startswith(start)), "")


def _walk_jpeg(data: bytes) -> tuple[int, int] | None:
    size, at, junk, metadata = None, 2, 0, 0
    for _ in range(MAX_SEGMENTS):
        found = _NEXT_MARKER.search(data, at, at + MAX_JUNK_BYTES + 2)
        if found is None:
            _check(len(data) - at, MAX_JUNK_BYTES, "bytes between two segments")
            return size
        junk += found.end() - 2 - at
        marker, at = found[1][0], found.end()
        if marker in _STANDALONE:
            continue
        if marker == 0xDA:
            if size is not None:
                _check_scans(data, at, size[0] * size[1])
            return size
        (length,) = struct.unpack_from(">H", data, at)
        if 0xC0 <= marker <= 0xCF and marker not in _NO_FRAME:
            height, width = struct.unpack_from(">HH", data, at + 3)
            size = (width, height)
        metadata += length if marker in _METADATA else 0
        at += length
        _check(junk, MAX_JUNK_BYTES, "bytes between its segments")
        _check(metadata, MAX_METADATA_BYTES, "bytes of metadata")
    raise _too_much(MAX_SEGMENTS, "segments before its pixels")


def _check_scans(data: bytes, at: int, pixels: int) -> None:
    """Look for what makes the decoder start over.

    Scans are counted, exactly only where the bytes that begin one are seen often.
    """
    if _FILL in data:  # between two markers: libjpeg begins again with each block that it gets
        raise _too_much(len(_FILL), "fill bytes")
    most = min(MAX_SCANS, max(10, MAX_SCAN_PIXELS // max(1, pixels)))
    if data.count(b"\xff\xda") <= most:  # also seen in thumbnails and behind the picture
        return
    scans = 1
    at += int.from_bytes(data[at : at + 2], "big")
    while (found := _NEXT_MARKER.search(data, at)) is not None and found[1] != b"\xd9":
        at = found.end()
        scans += found[1] == b"\xda"
        _check(scans, most, f"scans of {pixels} pixels")
        if found[1][0] not in _STANDALONE:
            at += max(2, int.from_bytes(data[at : at + 2], "big"))


def _walk_png(data: bytes) -> tuple[int, int] | None:
    width, height = struct.unpack_from(">II", data, 16)
    at, side_chunks, chunks = 8, 0, 0
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        chunks += 1
        side_chunks += kind != b"IDAT"
        _check(side_chunks, MAX_SIDE_CHUNKS, "chunks beside its pixels")
        _check(chunks, 2000 + len(data) // 1024, "chunks, most of them tiny")
        if kind == b"IEND":
            break
        at += 12 + length
    return width, height


def _walk_gif(data: bytes) -> tuple[int, int] | None:
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    at = 13 + (3 << ((flags & 7) + 1) if flags & 0x80 else 0)
    junk = blocks = 0
    while data[at] != 0x3B:
        if data[at] == 0x2C:
            left, top, across, down = struct.unpack_from("<HHHH", data, at + 1)
            return max(width, left + across), max(height, top + down)
        if data[at] == 0x21:
            at += 2
            while data[at]:
                at += 1 + data[at]
                blocks += 1
                _check(blocks, MAX_SUB_BLOCKS, "blocks before its pixels")
        else:
            junk += 1
            _check(junk, MAX_JUNK_BYTES, "bytes between its blocks")
        at += 1
        blocks += 1
        _check(blocks, MAX_JUNK_BYTES + MAX_SUB_BLOCKS, "blocks before its pixels")
    return width, height


def _walk_webp(data: bytes) -> tuple[int, int] | None:
    kind = data[12:16]
    if kind == b"VP8X":
        return (
            1 + int.from_bytes(data[24:27], "little"),
            1 + int.from_bytes(data[27:30], "little"),
        )
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    width, height = struct.unpack_from("<HH", data, 26)
    return width & 0x3FFF, height & 0x3FFF


_WALKS = {"JPEG": _walk_jpeg, "PNG": _walk_png, "GIF": _walk_gif, "WEBP": _walk_webp}


def _check(count: int, limit: int, what: str) -> None:
    if count > limit:
        raise _too_much(limit, what)


def _too_much(limit: int, what: str) -> InvalidImage:
    return InvalidImage(f"the image cannot be decoded: over {limit} {what}")
