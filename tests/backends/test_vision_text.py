"""Languages, scores, smallest lines and order of Vision's text."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from immich_ml_metal.backends.vision.bridge import SeenLine
from immich_ml_metal.backends.vision.calibration import (
    FACE_KNOTS,
    LINE_BOX_KNOTS,
    LINE_KNOTS,
    Calibration,
)
from immich_ml_metal.backends.vision.text import (
    min_text_height,
    text_options,
    to_regions,
    wanted_languages,
)
from immich_ml_metal.catalog import Family, all_models

# What macOS 14 lists at the accurate level, in its spelling.
MACOS_14 = (
    *("en-US", "fr-FR", "it-IT", "de-DE", "es-ES", "pt-BR", "zh-Hans", "zh-Hant", "yue-Hans"),
    *("yue-Hant", "ko-KR", "ja-JP", "ru-RU", "uk-UA", "th-TH", "vi-VT", "ar-SA", "ars-SA"),
)


# no subnormals: ONNX Runtime, in the same process, tells the processor to take them for zero
confidences = st.floats(0, 1, allow_subnormal=False)


@pytest.mark.parametrize(
    ("name", "languages"),
    [
        ("PP-OCRv5_mobile", ("zh-Hans", "zh-Hant", "ja-JP", "en-US")),
        ("CH__PP-OCRv5_server", ("zh-Hans", "zh-Hant", "ja-JP", "en-US")),
        ("EN__PP-OCRv5_mobile", ("en-US",)),
        ("KOREAN__PP-OCRv5_mobile", ("ko-KR", "en-US")),
        ("ESLAV__PP-OCRv5_mobile", ("ru-RU", "uk-UA", "en-US")),
        ("TH__PP-OCRv5_mobile", ("th-TH", "en-US")),
        ("EL__PP-OCRv5_mobile", ()),  # no Greek: nothing at all rather than Greek read as English
        ("PP-OCRv6_small", MACOS_14),
    ],
)
def test_a_model_name_asks_for_what_that_model_reads(name: str, languages: tuple[str, ...]) -> None:
    assert wanted_languages(name, MACOS_14) == languages


def test_latin_asks_for_every_latin_language_that_is_there() -> None:
    latin = wanted_languages("LATIN__PP-OCRv5_mobile", MACOS_14)
    assert latin == ("en-US", "fr-FR", "it-IT", "de-DE", "es-ES", "pt-BR", "vi-VT")
    newer = wanted_languages("LATIN__PP-OCRv5_mobile", [*MACOS_14, "pl-PL", "tr-TR"])
    assert {"pl-PL", "tr-TR"} <= set(newer)


def test_every_official_text_model_has_a_rule() -> None:
    every = (*MACOS_14, "el-GR")
    names = [model.name for model in all_models() if model.family is Family.PADDLE]
    assert len(names) > 10
    assert [name for name in names if not wanted_languages(name, every)] == []


def test_vision_decides_the_language_only_where_there_is_a_choice() -> None:
    assert not text_options(("en-US",), 0.01, corrects=True).detects_language
    assert text_options(("ko-KR", "en-US"), 0.01, corrects=True).detects_language


def test_the_smallest_line_is_the_official_detectors() -> None:
    # 1440 x 1920 at 736: the detector sees 736 x 992 and drops boxes under 5 px of that
    assert min_text_height((1440, 1920), 736) == pytest.approx(5 / 992)
    assert min_text_height((1440, 1920), 1440) == pytest.approx(5 / 1920)


@given(
    width=st.integers(32, 5000),
    height=st.integers(32, 5000),
    low=st.integers(32, 4000),
    more=st.integers(0, 4000),
)
def test_a_higher_max_resolution_never_overlooks_more(
    width: int, height: int, low: int, more: int
) -> None:
    limit = min_text_height((width, height), low)
    assert 0 < min_text_height((width, height), low + more) <= limit < 1


def line(text: str, x: float, y: float, confidence: float = 1.0) -> SeenLine:
    """A line whose top-left corner is at (x, y), y counted downwards in 0..1."""
    corners = [(x, 1 - y), (x + 0.1, 1 - y), (x + 0.1, 0.98 - y), (x, 0.98 - y)]
    return SeenLine(np.array(corners), confidence, text, confidence)


def regions(lines: list[SeenLine], min_score: float = 0.5) -> list[str]:
    found = to_regions(
        lines,
        (1000, 1000),
        box_score=Calibration(LINE_BOX_KNOTS),
        line_score=Calibration(LINE_KNOTS),
        min_score=min_score,
    )
    assert found.readings is not None
    assert len(found.readings) == len(found.scores) == len(found.quads)
    return [reading.text for reading in found.readings]


def test_lines_come_in_reading_order() -> None:
    mixed = [line("d", 0.1, 0.5), line("b", 0.5, 0.105), line("c", 0.8, 0.1), line("a", 0.1, 0.109)]
    assert regions(mixed) == ["a", "b", "c", "d"]


def test_a_picture_without_text_gives_no_regions_but_a_list() -> None:
    assert regions([]) == []


def test_immichs_default_thresholds_keep_what_a_reader_would_keep() -> None:
    box, text = Calibration(LINE_BOX_KNOTS), Calibration(LINE_KNOTS)
    kept = {grade: box(grade) >= 0.5 and text(grade) > 0.8 for grade in (0.3, 0.5, 1.0)}
    assert kept == {0.3: False, 0.5: True, 1.0: True}


def test_the_two_thresholds_of_text_are_separate() -> None:
    lines = [line("sure", 0.1, 0.1), line("likely", 0.1, 0.3, 0.5), line("guess", 0.1, 0.5, 0.3)]
    assert regions(lines, min_score=0.5) == ["sure", "likely", "guess"]
    assert regions(lines, min_score=0.6) == ["sure", "likely"]
    assert regions(lines, min_score=0.9) == ["sure"]


def test_a_line_just_at_the_minimum_score_is_kept() -> None:
    score = float(np.float32(Calibration(LINE_BOX_KNOTS)(0.5)))
    assert regions([line("likely", 0.1, 0.3, 0.5)], min_score=score) == ["likely"]
    assert regions([line("likely", 0.1, 0.3, 0.5)], min_score=np.nextafter(score, 1)) == []


def test_immichs_face_threshold_keeps_the_faces_that_vision_is_fairly_sure_of() -> None:
    score = Calibration(FACE_KNOTS)
    assert score(0.61) >= 0.7 > score(0.59)


@given(low=confidences, high=confidences)
def test_calibration_keeps_the_order_and_the_range(low: float, high: float) -> None:
    for knots in (FACE_KNOTS, LINE_KNOTS, LINE_BOX_KNOTS):
        a, b = sorted((low, high))
        assert 0 <= Calibration(knots)(a) <= Calibration(knots)(b) <= 1


@pytest.mark.parametrize(
    "knots",
    [
        (),
        ((0, 0),),
        ((0, 0), (0.5, 0.5)),
        ((0.1, 0), (1, 1)),
        ((0, 0), (0.6, 0.7), (0.5, 0.8), (1, 1)),
        ((0, 0), (0.5, 0.9), (1, 0.8)),
        ((0, 0), (1, 1.2)),
    ],
)
def test_a_calibration_that_does_not_rise_from_end_to_end_is_refused(
    knots: tuple[tuple[float, float], ...],
) -> None:
    with pytest.raises(ValueError, match="calibration"):
        Calibration(knots)
