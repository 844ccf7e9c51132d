from dataclasses import replace

import pytest

from immich_ml_metal.catalog import all_models, find_by_name
from immich_ml_metal.models.advice import LIMITED, Here, memory_bytes, reads, recommend
from immich_ml_metal.types import Task

GB = 10**9
MAC = Here(16 * GB, "mlx")


@pytest.mark.parametrize(
    ("memory", "languages", "engine", "search"),
    [
        (64 * GB, ["en"], "mlx", "ViT-SO400M-16-SigLIP2-384__webli"),
        (16 * GB, ["en"], "mlx", "ViT-SO400M-16-SigLIP2-384__webli"),
        (8 * GB, ["en"], "mlx", "ViT-B-16-SigLIP2__webli"),
        (8 * GB, ["en-US"], "cpu", "ViT-B-16-SigLIP2__webli"),
        (4 * GB, ["en"], "cpu", "ViT-B-32__laion2b-s34b-b79k"),
        (64 * GB, ["de", "en"], "mlx", "ViT-SO400M-16-SigLIP2-384__webli"),
        (8 * GB, ["de"], "mlx", "XLM-Roberta-Large-Vit-B-16Plus"),
        (8 * GB, ["th"], "mlx", "ViT-L-16-SigLIP2-256__webli"),
    ],
)
def test_the_best_of_immichs_list_that_fits_is_recommended(
    memory: int, languages: list[str], engine: str, search: str
) -> None:
    assert recommend(Here(memory, engine), languages)[0].spec.name == search


def test_a_machine_too_small_for_any_gets_the_smallest_and_is_told() -> None:
    advice = recommend(Here(GB, "mlx"), ["ja"])[0]
    assert "more than the advised 200 MB" in advice.reason
    assert advice.spec.size_bytes == min(
        find_by_name(name).size_bytes
        for name in ("XLM-Roberta-Large-Vit-B-32", "ViT-L-16-SigLIP2-256__webli")
    )


@pytest.mark.parametrize(
    ("languages", "text"),
    [
        (["de", "fr"], "PP-OCRv6_small"),
        (["ja"], "PP-OCRv6_small"),
        (["uk"], "ESLAV__PP-OCRv5_mobile"),
        (["ko", "en"], "KOREAN__PP-OCRv5_mobile"),
        (["el"], "EL__PP-OCRv5_mobile"),
        (["th"], "TH__PP-OCRv5_mobile"),
    ],
)
def test_the_text_model_reads_the_languages(languages: list[str], text: str) -> None:
    assert recommend(MAC, languages)[2].spec.name == text


def test_languages_that_no_text_model_reads_together_are_named() -> None:
    advice = recommend(MAC, ["ko", "de", "fr"])[2]
    assert advice.spec.name == "PP-OCRv6_small"
    assert advice.reason.endswith("lacks ko")


def test_a_multilingual_model_is_not_said_to_read_one_language_in_particular() -> None:
    assert "reads 100 languages or more" in recommend(Here(64 * GB, "mlx"), ["xx"])[0].reason
    assert "reads en;" in recommend(Here(4 * GB, "cpu"), ["en"])[0].reason


def test_mlx_holds_weights_in_half_precision() -> None:
    spec = find_by_name("ViT-B-32__openai")
    assert memory_bytes(spec)["mlx"] * 2 == memory_bytes(spec)["cpu"] == spec.size_bytes


def test_a_multilingual_model_reads_everything_and_an_english_one_does_not() -> None:
    german = frozenset({"de"})
    able = [spec for spec in all_models() if spec.task is Task.CLIP and reads(spec, german)]
    assert find_by_name("ViT-B-16-SigLIP2__webli") in able
    assert find_by_name("ViT-B-32__openai") not in able


def test_a_model_with_a_limited_licence_is_passed_over_and_told() -> None:
    search, faces, _ = recommend(Here(64 * GB, "mlx"), ["de"])
    assert search.spec.licence not in LIMITED
    assert "nllb-clip-large-siglip__mrl, licence CC-BY-NC-4.0" in search.notes[0]
    assert faces.spec.licence in LIMITED  # there is no other; what prints it says so


def test_a_model_that_is_too_slow_here_is_passed_over_by_what_was_measured_of_another() -> None:
    quick, slow = ({"ViT-B-32__openai": ms} for ms in (5.0, 50.0))
    here = Here(64 * GB, "cpu", quick)
    assert recommend(here, ["en"])[0].spec.name == "ViT-SO400M-16-SigLIP2-384__webli"
    advice = recommend(replace(here, picture_ms=slow), ["en"])[0]
    assert advice.spec.name == "ViT-B-16-SigLIP2__webli"
    assert "s a picture, reckoned from ViT-B-32__openai, measured here" in advice.notes[0]
    known = replace(here, picture_ms={"ViT-SO400M-16-SigLIP2-384__webli": 500.0, **slow})
    assert recommend(known, ["en"])[0].spec.name == "ViT-SO400M-16-SigLIP2-384__webli"


def test_what_looking_at_every_photo_again_costs_is_told() -> None:
    name = "ViT-B-16-SigLIP2__webli"
    here = Here(8 * GB, "cpu", {name: 36.0}, search_model="ViT-B-32__openai")
    assert "some 1.0 hours for 100,000 (measured here)" in recommend(here, ["en"])[0].notes[-1]
    unknown = recommend(replace(here, picture_ms={}), ["en"])[0].notes[-1]
    assert unknown.endswith(f"immich-ml-metal qualify {name}")
    assert "set already" in recommend(replace(here, search_model=name), ["en"])[0].notes[-1]
