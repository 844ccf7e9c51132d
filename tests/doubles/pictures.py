"""Pictures of noise, where every pixel counts, the same in every run; and their files."""

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> Bytes:
    """(height, width, channels) uint8."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def noise_picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(noise(height, width))


def grainy_picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A smooth picture with noise on it: both averages and edges matter."""
    rng = np.random.default_rng(seed)
    smooth = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    base = np.asarray(smooth.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    grain = rng.integers(-40, 41, base.shape)
    return Image.fromarray((base + grain).clip(0, 255).astype(np.uint8))


def encode(image: Image.Image, file_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def chunk(kind: bytes, body: bytes = b"") -> bytes:
    """A piece of a PNG."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
