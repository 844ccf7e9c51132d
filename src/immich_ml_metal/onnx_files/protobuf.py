"""The least of protobuf's wire format that a walk over an ONNX file needs; nothing is copied."""

from collections.abc import Iterator
from mmap import mmap

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class NotOnnx(ValueError):
    """The file is torn, is not an ONNX model, or names weights outside its folder."""


def messages(view: mmap, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(number, start, end) of every length-delimited field of the message at `start`..`end`.

    Raises:
        NotOnnx: the bytes are torn or something else.
    """
    at = start
    while at < end:
        tag, at = _varint(view, at, end)
        number, wire = tag >> 3, tag & 7
        size = 0
        if wire == _VARINT:
            _, at = _varint(view, at, end)
        elif wire in (_FIXED64, _FIXED32):
            size = 8 if wire == _FIXED64 else 4
        elif wire == _BYTES:
            size, at = _varint(view, at, end)
        else:
            raise NotOnnx(f"wire type {wire} at byte {at}")
        if number == 0 or at + size > end:
            raise NotOnnx(f"torn at byte {at}: a field goes on for {size} bytes")
        if wire == _BYTES:
            yield number, at, at + size
        at += size


def _varint(view: mmap, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end and shift < 70:
        byte = view[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
    raise NotOnnx(f"torn at byte {at}")
