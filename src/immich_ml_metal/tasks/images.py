"""Bytes → RGB pixels, once per picture.

Decodes as Immich's own service does: stored orientation, no colour management, alpha dropped, first
frame. Limits are checked on the header, before any pixel is decoded. Knows nothing about tasks.
"""

import io
import math
import struct
import zlib
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
from PIL import Image, UnidentifiedImageError

from immich_ml_metal.errors import ImageTooLarge, InvalidImage
from immich_ml_metal.types import Bytes

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
    """Decode a file's bytes.

    Raises:
        InvalidImage: not a picture, cut off, or with zero width or height.
        ImageTooLarge: over the limits; found on the header, before decoding.
    """
    if not data:
        raise InvalidImage("the image is empty")
    _raise_pillow_limit(limits.max_pixels)
    try:
        with Image.open(io.BytesIO(data), formats=_formats()) as image:
            _check_size(image.size, limits)
            image.load()
            _check_size(image.size, limits)  # icon files hold a picture of a size of its own
            return Picture(_to_rgb(image))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as exc:
        raise ImageTooLarge(f"the image is over {limits.max_pixels} pixels") from exc
    except _BROKEN as exc:
        raise InvalidImage(f"the image cannot be decoded: {_reason(exc)}") from exc


def count_pixels(data: bytes) -> int:
    """Pixels that a file's header announces; 0 where it cannot be read, which `decode` explains."""
    _raise_pillow_limit(OFFICIAL_MAX_PIXELS)
    try:
        with Image.open(io.BytesIO(data), formats=_formats()) as image:
            return math.prod(image.size)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning, *_BROKEN):
        return 0


@cache
def _formats() -> tuple[str, ...]:
    """Every format Pillow knows but EPS, for which it starts Ghostscript on the upload.

    Goes when Pillow no longer starts programs.
    """
    Image.preinit()  # the common ones first, as Pillow itself tries them
    Image.init()
    return tuple(name for name in Image.ID if name != "EPS")


def _raise_pillow_limit(max_pixels: int) -> None:
    """Let Pillow open what our own limit allows, without a warning: its limit is process-wide.

    It is never lowered, so threads with different limits do not disturb each other.
    """
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels


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
    """
    left, top, right, bottom = box or (0, 0, *image.size)
    width, height = size
    reach = _WIDEST_FILTER_PX * max(1.0, (bottom - top) / height) + 1  # rows seen beyond the box
    first, last = max(0, int(top - reach)), min(image.height, math.ceil(bottom + reach))
    rows = image if last - first == image.height else image.crop((0, first, image.width, last))
    across = rows.resize((width, rows.height), resample, box=(left, 0, right, rows.height))
    return across.resize(size, resample, box=(0, top - first, width, bottom - first))
