"""Decodes one picture of a rare format, in a process that may be ended at any time.

The file comes on standard input; the pixels leave on standard output behind a line with width and
height, or the reason for a refusal on standard error with its exit status.
"""

import importlib
import os
import resource
import sys
import warnings
from typing import NoReturn

EXIT_INVALID = 3
EXIT_TOO_LARGE = 4
CPU_LIMIT_S = 10
MEMORY_LIMIT_BYTES = 3 * 2**30
_ROWS = 256  # written at once, so that no second copy of a large picture is made


def main() -> None:
    """`python -m immich_ml_metal.worker.other_formats_child < FILE > PIXELS`."""
    _limit_myself()
    from PIL import Image

    from immich_ml_metal.errors import ImageTooLarge, InvalidImage
    from immich_ml_metal.tasks.images import ImageLimits, decode_other

    limits = ImageLimits()
    Image.MAX_IMAGE_PIXELS = limits.max_pixels  # for pictures within files, as icons have them
    warnings.simplefilter("ignore")
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    _add_heif()
    try:
        image = decode_other(sys.stdin.buffer.read(), limits).image
    except InvalidImage as exc:
        _end(EXIT_INVALID, str(exc))
    except ImageTooLarge as exc:
        _end(EXIT_TOO_LARGE, str(exc))
    except MemoryError:
        _end(EXIT_INVALID, "the image cannot be decoded: it takes too much memory")
    out = sys.stdout.buffer
    out.write(b"%d %d\n" % image.size)
    for top in range(0, image.height, _ROWS):
        rows = image.crop((0, top, image.width, min(image.height, top + _ROWS)))
        out.write(rows.tobytes())
    out.flush()


def _limit_myself() -> None:
    """Limits of the system's own: they hold when nobody is left to end this process."""
    os.nice(10)
    os.putenv("OPENBLAS_NUM_THREADS", "1")  # each of its threads reserves 30 MB
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_LIMIT_S, CPU_LIMIT_S + 1))
    if sys.platform == "linux":  # macOS takes the limit and does not keep it: the parent looks
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))


def _add_heif() -> None:
    try:
        heif = importlib.import_module("pillow_heif")
    except ImportError:  # the extra `heif` is not installed
        return
    heif.register_heif_opener()


def _end(status: int, reason: str) -> NoReturn:
    sys.stderr.write(reason)
    sys.exit(status)


if __name__ == "__main__":
    main()
