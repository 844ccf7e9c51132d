"""Bytes → RGB pixels, once per picture.

Decodes as Immich's own service does: stored orientation, no colour management, alpha dropped, first
frame; but in this process only the formats that Immich's server sends. Limits are checked on the
header, before any pixel is decoded. Knows nothing about tasks.
"""

import io
import math
import struct
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from PIL import Image, UnidentifiedImageError

from immich_ml_metal.errors import ImageTooLarge, InvalidImage
from immich_ml_metal.tasks.picture_header import read_header
from immich_ml_metal.types import Bytes

# Every size is checked here before Pillow decodes. Its own limit is one for the whole process and
# would only warn, or refuse what ours allows.
Image.MAX_IMAGE_PIXELS = None

# Pillow keeps RGB as 4 bytes a pixel, and `Picture.pixels` is a second copy of 3.
_BYTES_PER_PIXEL = 7

# Where the official service, and Pillow by default, refuses a picture.
OFFICIAL_MAX_PIXELS = 178_956_970

_WIDEST_FILTER_PX = 3  # how far Lanczos reaches to each side, the widest of Pillow's filters

# What Pillow's decoders raise on files that break off or lie about themselves; found by fuzzing.
_BROKEN = (
    OSError,  # most, and UnidentifiedImageError
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    OverflowError,
    AttributeError,
    RuntimeError,  # AVIF, and NotImplementedError
    struct.error,
    zlib.error,
)


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """What a picture may measure: pixels in all, and pixels on its longer side."""

    max_pixels: int = OFFICIAL_MAX_PIXELS
    max_side_px: int = 65_535  # the longest that a JPEG can have


class Picture:
    """A decoded picture, in Pillow's form and as an array. Read-only, shared between tasks."""

    def __init__(self, image: Image.Image) -> None:
        self.image = image

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels, as stored in the file."""
        return self.image.size

    @property
    def size_bytes(self) -> int:
        """Memory held, both forms counted."""
        width, height = self.size
        return width * height * _BYTES_PER_PIXEL

    @cached_property
    def pixels(self) -> Bytes:
        """(H, W, 3) uint8 RGB, C-contiguous, read-only."""
        pixels = np.ascontiguousarray(self.image)
        pixels.flags.writeable = False
        return pixels


def decode(data: bytes, limits: ImageLimits) -> Picture:
    """Decode a JPEG, PNG, GIF or WebP: what Immich and browsers send.

    Raises:
        InvalidImage: another format, cut off, with zero width or height, or built so that it would
            take long.
        ImageTooLarge: over the limits; found on the header, before decoding.
    """
    if not data:
        raise InvalidImage("the image is empty")
    header = read_header(data)
    if not header.is_common:
        raise InvalidImage(_refusal(header.format))
    if header.size is not None:
        _check_size(header.size, limits)
    return _decode(data, limits, (header.format,))


def decode_other(data: bytes, limits: ImageLimits) -> Picture:
    """Decode any format that Pillow knows, for as long as it takes: in a process of its own.

    Raises:
        InvalidImage: not a picture, cut off, or with zero width or height.
        ImageTooLarge: over the limits.
    """
    Image.preinit()  # the common ones first, as Pillow itself tries them
    Image.init()
    # EPS: Pillow would start Ghostscript on the upload. Goes when it no longer starts programs.
    return _decode(data, limits, tuple(name for name in Image.ID if name != "EPS"))


def count_pixels(data: bytes) -> int | None:
    """Pixels that `decode` will write, by the file's header; 0 where it refuses the file unread.

    None for formats that this process does not decode.
    """
    try:
        header = read_header(data)
        size = header.size or (0, 0)
        _check_size(size, ImageLimits())
    except (InvalidImage, ImageTooLarge):
        return 0
    if data and not header.is_common:
        return None
    return math.prod(size)


def _decode(data: bytes, limits: ImageLimits, formats: tuple[str, ...]) -> Picture:
    try:
        with Image.open(io.BytesIO(data), formats=formats) as image:
            _check_size(image.size, limits)
            image.load()
            _check_size(image.size, limits)  # icon files hold a picture of a size of its own
            return Picture(_to_rgb(image))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as exc:
        raise ImageTooLarge(f"the image is over {limits.max_pixels} pixels") from exc
    except _BROKEN as exc:
        raise InvalidImage(f"the image cannot be decoded: {_reason(exc)}") from exc


def _refusal(name: str) -> str:
    if not name:
        return "the image cannot be decoded: unknown format"
    return (
        f"{name} pictures are not decoded here, only JPEG, PNG, GIF and WebP; "
        "ML_DECODE_OTHER_FORMATS=true allows them"
    )


def _to_rgb(image: Image.Image) -> Image.Image:
    """In mode RGB; alpha and transparent colours are dropped, not blended."""
    if image.mode == "RGB":
        return image
    image.info.pop("transparency", None)  # unused for RGB, but Pillow would warn about a palette's
    return image.convert("RGB")


def _check_size(size: tuple[int, int], limits: ImageLimits) -> None:
    width, height = size
    if width * height > limits.max_pixels:
        raise ImageTooLarge(
            f"the image has {width * height} pixels ({width}x{height}), limit {limits.max_pixels}"
        )
    if max(size) > limits.max_side_px:
        raise ImageTooLarge(
            f"the image's longer side is {max(size)} px, limit {limits.max_side_px}"
        )


def _reason(exc: BaseException) -> str:
    if isinstance(exc, UnidentifiedImageError):  # what Pillow says of a zero side as well
        return "unknown format, or zero width or height"
    return str(exc) or type(exc).__name__


def resize(
    image: Image.Image,
    size: tuple[int, int],
    resample: Image.Resampling,
    *,
    box: tuple[float, float, float, float] | None = None,
    threads: int = 1,
) -> Image.Image:
    """Resize an RGB picture, or `box` of it: across, then down.

    That was Pillow's order up to version 12, which the official service runs. Pillow 13 takes the
    cheaper order, and as the bytes in between are rounded, pixels differ by up to 15 levels. Goes
    when the official service runs Pillow 13.

    Args:
        image: the picture.
        size: (width, height) of the result in pixels.
        resample: Pillow's filter.
        box: left, top, right, bottom in the picture's pixels; all of it by default.
        threads: share the work. Rows are resized across, and columns down, each without the
            others, so any number of threads makes the same pixels.
    """
    left, top, right, bottom = box or (0, 0, *image.size)
    width, height = size
    reach = _WIDEST_FILTER_PX * max(1.0, (bottom - top) / height) + 1  # rows seen beyond the box
    first, last = max(0, int(top - reach)), min(image.height, math.ceil(bottom + reach))
    rows = _cut(image, (0, first, image.width, last))
    across = _resize_rows(rows, width, (left, right), resample, threads)
    return _resize_columns(across, height, (top - first, bottom - first), resample, threads)


def _resize_rows(
    image: Image.Image,
    width: int,
    span: tuple[float, float],
    resample: Image.Resampling,
    threads: int,
) -> Image.Image:
    """Resize what lies between two x to `width`; the height stays."""

    def strip(start: int, end: int) -> Image.Image:
        rows = _cut(image, (0, start, image.width, end))
        return rows.resize((width, end - start), resample, box=(span[0], 0, span[1], end - start))

    return _in_strips(strip, (width, image.height), threads, axis=1)


def _resize_columns(
    image: Image.Image,
    height: int,
    span: tuple[float, float],
    resample: Image.Resampling,
    threads: int,
) -> Image.Image:
    """Resize what lies between two y to `height`; the width stays."""

    def strip(start: int, end: int) -> Image.Image:
        columns = _cut(image, (start, 0, end, image.height))
        bounds = (0, span[0], end - start, span[1])
        return columns.resize((end - start, height), resample, box=bounds)

    return _in_strips(strip, (image.width, height), threads, axis=0)


def _cut(image: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
    return image if box == (0, 0, *image.size) else image.crop(box)


def _in_strips(
    make: Callable[[int, int], Image.Image], size: tuple[int, int], threads: int, *, axis: int
) -> Image.Image:
    """Make a picture of `size` in strips along an axis (0: x), one strip per thread.

    The threads start with the caller's priority.
    """
    if threads == 1 or size[axis] < threads:
        return make(0, size[axis])
    edges = [size[axis] * number // threads for number in range(threads + 1)]
    whole = Image.new("RGB", size)
    with ThreadPoolExecutor(threads - 1) as helpers:
        others = [(start, helpers.submit(make, start, end)) for start, end in pairwise(edges[1:])]
        whole.paste(make(*edges[:2]))
        for start, strip in others:
            whole.paste(strip.result(), (0, start) if axis else (start, 0))
    return whole
