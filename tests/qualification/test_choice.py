"""Who answers, by the rule and what was measured: decided without measuring anything."""

from collections.abc import Mapping
from typing import Any

import pytest
from doubles.odd_engines import M_SERIES

from immich_ml_metal.backends.selection import (
    FACE_FINDING,
    REFERENCE,
    TEXT_READING,
    Candidate,
    Platform,
    rule_for,
)
from immich_ml_metal.qualification.choice import Choice, decide
from immich_ml_metal.qualification.record import Entry
from immich_ml_metal.qualification.verdict import Figures, Judged, Outcome, Verdict
from immich_ml_metal.settings import Settings
from immich_ml_metal.types import Part, Slot, Task

VISUAL: Slot = (Task.CLIP, Part.VISUAL)
TEXTUAL: Slot = (Task.CLIP, Part.TEXTUAL)
FINDING: Slot = (Task.OCR, Part.DETECTION)
NOW = {"system": "macOS 25A1"}
BEFORE = {"system": "macOS 24F5"}
FLOAT16, MIXED, FLOAT32 = (Candidate("mlx", name) for name in ("float16", "mixed", "float32"))
VISION = Candidate("vision", "its own")
COREML, COREML_WHOLE = Candidate("coreml", "float16"), Candidate("coreml")
RIGHT, WRONG = Verdict(Outcome.RIGHT), Verdict(Outcome.WRONG, "cosine 0.99")
CRASHED = Verdict(Outcome.CRASHED, "SIGABRT")


def entry(
    verdicts: Mapping[Candidate, Verdict],
    *,
    facts: Mapping[str, str] = NOW,
    chosen: Candidate | None = None,
    under: str = "profile balanced",
    depth: str = "check",
) -> Entry:
    judged = {one: Judged(one, verdict, facts, depth) for one, verdict in verdicts.items()}
    return Entry(judged=judged, chosen=chosen, chosen_under=under)


def choose(slot: Slot, remembered: Entry, platform: Platform = M_SERIES, **settings: Any) -> Choice:
    rule = rule_for(slot, Settings(**settings), platform)
    return decide(slot, rule, remembered, lambda engine: NOW)


def timed(ms: float) -> Verdict:
    return Verdict(Outcome.RIGHT, figures=Figures(alone_ms=ms, batch_ms=ms))


def test_on_linux_the_reference_answers_and_nothing_is_pending() -> None:
    choice = choose(VISUAL, Entry(), Platform("Linux", "x86_64"))
    assert choice == Choice(REFERENCE, "portable default, the reference")


def test_without_a_verdict_the_cpu_answers_until_it_is_here() -> None:
    choice = choose(VISUAL, Entry())
    assert choice.candidate == REFERENCE
    assert choice.is_pending
    assert choice.reason == "profile balanced, until mlx float16 is checked"


def test_the_first_choice_that_passed_answers() -> None:
    choice = choose(VISUAL, entry({FLOAT16: RIGHT}))
    assert choice == Choice(FLOAT16, "profile balanced")


def test_a_wrong_first_choice_leads_one_step_down_the_ladder() -> None:
    assert choose(VISUAL, entry({FLOAT16: WRONG})).is_pending
    choice = choose(VISUAL, entry({FLOAT16: WRONG, MIXED: RIGHT}))
    assert choice == Choice(MIXED, "profile balanced, mlx float16 not usable")


def test_where_nothing_passes_the_cpu_answers_and_it_is_said() -> None:
    failed = dict.fromkeys((FLOAT16, MIXED, FLOAT32, COREML, COREML_WHOLE), CRASHED)
    choice = choose(VISUAL, entry(failed))
    assert choice.candidate == REFERENCE
    assert not choice.is_pending
    assert "mlx float16 is not used: crashed: SIGABRT" in choice.warning


def test_after_an_update_the_last_good_choice_answers_until_it_is_checked_again() -> None:
    old = entry({FLOAT16: RIGHT}, facts=BEFORE, chosen=FLOAT16)
    choice = choose(VISUAL, old)
    assert choice.candidate == FLOAT16
    assert choice.is_pending


def test_a_last_choice_that_is_now_known_to_be_bad_does_not_answer() -> None:
    choice = choose(VISUAL, entry({FLOAT16: WRONG}, chosen=FLOAT16))
    assert choice.candidate == REFERENCE
    assert choice.is_pending


def test_the_fastest_answers_where_all_were_compared() -> None:
    speeds = {FLOAT16: 20, MIXED: 30, FLOAT32: 40, COREML: 10, COREML_WHOLE: 25, REFERENCE: 90}
    remembered = entry({one: timed(ms) for one, ms in speeds.items()}, depth="comparison")
    choice = choose(VISUAL, remembered)
    assert choice.candidate == COREML
    assert choice.reason == "profile balanced, fastest of 6 that are right: 10.0 ms"


def test_a_fast_engine_beyond_the_limits_is_not_used() -> None:
    verdicts = {FLOAT16: timed(20), MIXED: timed(30), FLOAT32: timed(40), REFERENCE: timed(90)}
    bad = Verdict(Outcome.WRONG, "", Figures(alone_ms=1, batch_ms=1))
    remembered = entry({**verdicts, COREML: bad, COREML_WHOLE: bad}, depth="comparison")
    assert choose(VISUAL, remembered).candidate == FLOAT16


def test_a_tie_goes_to_the_engine_that_leaves_the_gpu_free() -> None:
    speeds = {FLOAT16: 20, MIXED: 30, FLOAT32: 40, COREML: 21.5, COREML_WHOLE: 25, REFERENCE: 90}
    remembered = entry({one: timed(ms) for one, ms in speeds.items()}, depth="comparison")
    assert choose(VISUAL, remembered).candidate == COREML


def test_for_search_texts_the_time_alone_counts() -> None:
    fast_alone = Verdict(Outcome.RIGHT, figures=Figures(alone_ms=5, batch_ms=5))
    fast_together = Verdict(Outcome.RIGHT, figures=Figures(alone_ms=9, batch_ms=1))
    others = dict.fromkeys((MIXED, FLOAT32, COREML_WHOLE, REFERENCE), timed(50))
    remembered = entry({FLOAT16: fast_together, COREML: fast_alone, **others}, depth="comparison")
    assert choose(TEXTUAL, remembered).candidate == COREML
    assert choose(VISUAL, remembered).candidate == FLOAT16


def test_text_stays_with_vision_where_it_reads_right_however_fast_others_are() -> None:
    others = dict.fromkeys((FLOAT16, MIXED, FLOAT32, REFERENCE), timed(1))
    remembered = entry({VISION: timed(50), **others}, depth="comparison")
    assert choose(FINDING, remembered).candidate == VISION
    wrong = entry({VISION: WRONG, **others}, depth="comparison")
    assert choose(FINDING, wrong).candidate.family == "immich"


def test_vision_is_no_candidate_for_reading_alone() -> None:
    rule = rule_for(TEXT_READING, Settings(), M_SERIES)
    assert all(one.engine != "vision" for one in rule.candidates)


def test_an_engine_asked_for_by_name_answers_at_once_and_a_bad_verdict_is_said() -> None:
    assert choose(VISUAL, Entry(), clip_engine="mlx").candidate == FLOAT16
    bad = entry(dict.fromkeys((FLOAT16, MIXED, FLOAT32), WRONG))
    choice = choose(VISUAL, bad, clip_engine="mlx")
    assert choice.candidate == FLOAT16
    assert "asked for by ML_CLIP_ENGINE, but mlx float16: wrong" in choice.warning


def test_a_number_format_asked_for_by_name_is_the_only_one() -> None:
    rule = rule_for(VISUAL, Settings(mlx_dtype="bfloat16"), M_SERIES)
    assert [str(one) for one in rule.candidates] == [
        *("mlx bfloat16", "coreml float16", "coreml float32", "cpu float32")
    ]


# -- faces -----------------------------------------------------------------------------------------


def test_in_native_vision_finds_faces_from_the_first_picture_on() -> None:
    choice = choose(FACE_FINDING, Entry(), profile="native")
    assert choice.candidate == VISION
    assert choice.is_pending


def test_faces_that_had_to_leave_vision_stay_away_when_it_works_again() -> None:
    broken = entry({VISION: CRASHED, FLOAT16: RIGHT}, under="profile native")
    moved = choose(FACE_FINDING, broken, profile="native")
    assert moved.candidate == FLOAT16
    assert "faces are found by mlx and not by vision" in moved.warning

    mended = {VISION: Verdict(Outcome.WORKS), FLOAT16: RIGHT}
    again = entry(mended, chosen=FLOAT16, under="profile native")
    kept = choose(FACE_FINDING, again, profile="native")
    assert kept.candidate == FLOAT16
    assert "until you run immich-ml-metal qualify" in kept.warning


def test_another_profile_moves_faces_because_the_operator_said_so() -> None:
    native = entry({VISION: RIGHT, FLOAT16: RIGHT}, chosen=VISION, under="profile native")
    assert choose(FACE_FINDING, native).candidate == FLOAT16


@pytest.mark.parametrize("profile", ["balanced", "exact"])
def test_elsewhere_faces_never_meet_vision(profile: Any) -> None:
    rule = rule_for(FACE_FINDING, Settings(profile=profile), M_SERIES)
    assert {one.family for one in rule.candidates} == {"immich"}
