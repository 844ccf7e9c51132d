"""What Vision is asked to read, and how its lines become ours. Pure.

Immich names its text models by script (`LATIN__PP-OCRv5_mobile`); Vision takes a list of languages.
"""

from collections.abc import Sequence

import numpy as np

from immich_ml_metal.backends.vision.bridge import SeenLine, TextOptions
from immich_ml_metal.backends.vision.calibration import Calibration
from immich_ml_metal.backends.vision.geometry import Size, quad_pixels
from immich_ml_metal.tasks.text_boxes import MIN_GROWN_PX, detection_size, reading_order
from immich_ml_metal.types import Reading, TextRegions

# Prefix of Immich's model name → what that model reads, as language tags without region, the
# script's own language first (the order matters to Vision). From Immich's own labels.
LANGUAGES: dict[str, tuple[str, ...]] = {
    "CH": ("zh-Hans", "zh-Hant", "ja", "en"),
    "EL": ("el", "en"),
    "EN": ("en",),
    "ESLAV": ("ru", "uk", "be", "en"),
    "KOREAN": ("ko", "en"),
    "LATIN": (
        *("en", "fr", "it", "de", "es", "pt", "nl", "da", "no", "nb", "nn", "sv"),
        *("pl", "cs", "ro", "tr", "id", "ms", "vi"),
    ),
    "TH": ("th", "en"),
}
UNPREFIXED = "CH"  # PP-OCRv5 without prefix is the Chinese, Japanese and English model
ALL_SCRIPTS = "PP-OCRv6"  # v6 has no prefixes: each size reads every script


def prefix(name: str) -> str:
    """Give the script prefix of an Immich text model name."""
    head, separator, _ = name.partition("__")
    return head if separator else UNPREFIXED


def wanted_languages(name: str, supported: Sequence[str]) -> tuple[str, ...]:
    """Give Vision's tags for what the model `name` reads, most wanted first.

    Empty where this macOS cannot read the script the model is for (Greek, as of macOS 26).
    """
    if name.startswith(ALL_SCRIPTS):
        return tuple(supported)
    wanted = LANGUAGES.get(prefix(name), ())
    if not wanted or not _matches(wanted[0], supported):
        return ()
    return tuple(tag for language in wanted for tag in _matches(language, supported))


def _matches(language: str, supported: Sequence[str]) -> list[str]:
    """`en` matches `en-US`; `zh-Hans` matches itself."""
    return [tag for tag in supported if tag == language or tag.startswith(f"{language}-")]


def min_text_height(size: Size, max_resolution: int) -> float:
    """Smallest line to look for, as a share of the picture's height.

    The official detector sees the picture with its short side reduced to `max_resolution`, and
    drops boxes under `MIN_GROWN_PX` there; its reader then sees every pixel. Vision does both at
    once, so the limit that follows from the reduction is passed on, and nothing is read from fewer
    pixels than there are.
    """
    return MIN_GROWN_PX / detection_size(size, max_resolution)[1]


def text_options(languages: tuple[str, ...], height: float, *, corrects: bool) -> TextOptions:
    """Ask for `languages`; with more than one, Vision decides per line which it is."""
    return TextOptions(
        languages=languages,
        detects_language=len(languages) > 1,
        corrects=corrects,
        min_height=height,
    )


def to_regions(
    lines: Sequence[SeenLine],
    size: Size,
    *,
    box_score: Calibration,
    line_score: Calibration,
    min_score: float,
) -> TextRegions:
    """Turn Vision's lines into ours: scores translated, weak boxes dropped, in reading order."""
    scores = np.array([box_score(line.box_confidence) for line in lines], np.float32)
    kept = [index for index in range(len(lines)) if scores[index] >= min_score]
    quads = np.zeros((0, 4, 2), np.float32)
    if kept:
        quads = np.stack([quad_pixels(lines[index].corners, size) for index in kept])
    order = reading_order(quads)
    ordered = [lines[kept[position]] for position in order]
    readings = tuple(Reading(line.text, line_score(line.confidence)) for line in ordered)
    return TextRegions(quads=quads[order], scores=scores[kept][order], readings=readings)
