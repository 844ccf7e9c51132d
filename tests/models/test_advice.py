import pytest

from immich_ml_metal.catalog import all_models, find_by_name
from immich_ml_metal.models.advice import memory_bytes, reads, recommend
from immich_ml_metal.types import Task

GB = 10**9


@pytest.mark.parametrize(
    ("memory", "languages", "engine", "search"),
    [
        (64 * GB, ["en"], "mlx", "ViT-SO400M-16-SigLIP2-384__webli"),
        (16 * GB, ["en"], "mlx", "ViT-SO400M-16-SigLIP2-384__webli"),
        (8 * GB, ["en"], "mlx", "ViT-B-16-SigLIP2__webli"),
        (8 * GB, ["en-US"], "cpu", "ViT-B-16-SigLIP2__webli"),
        (4 * GB, ["en"], "cpu", "ViT-B-32__laion2b-s34b-b79k"),
        (64 * GB, ["de", "en"], "mlx", "nllb-clip-large-siglip__mrl"),
        (8 * GB, ["de"], "mlx", "XLM-Roberta-Large-Vit-B-16Plus"),
        (8 * GB, ["th"], "mlx", "ViT-L-16-SigLIP2-256__webli"),
    ],
)
def test_the_best_of_immichs_list_that_fits_is_recommended(
    memory: int, languages: list[str], engine: str, search: str
) -> None:
    assert recommend(memory, languages, engine)[0].spec.name == search


def test_a_machine_too_small_for_any_gets_the_smallest_and_is_told() -> None:
    advice = recommend(GB, ["ja"], "mlx")[0]
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
    assert recommend(16 * GB, languages, "mlx")[2].spec.name == text


def test_languages_that_no_text_model_reads_together_are_named() -> None:
    advice = recommend(16 * GB, ["ko", "de", "fr"], "mlx")[2]
    assert advice.spec.name == "PP-OCRv6_small"
    assert advice.reason.endswith("lacks ko")


def test_a_multilingual_model_is_not_said_to_read_one_language_in_particular() -> None:
    assert "reads 100 languages or more" in recommend(64 * GB, ["xx"], "mlx")[0].reason
    assert "reads en;" in recommend(4 * GB, ["en"], "cpu")[0].reason


def test_mlx_holds_weights_in_half_precision() -> None:
    spec = find_by_name("ViT-B-32__openai")
    assert memory_bytes(spec)["mlx"] * 2 == memory_bytes(spec)["cpu"] == spec.size_bytes


def test_a_multilingual_model_reads_everything_and_an_english_one_does_not() -> None:
    german = frozenset({"de"})
    able = [spec for spec in all_models() if spec.task is Task.CLIP and reads(spec, german)]
    assert find_by_name("ViT-B-16-SigLIP2__webli") in able
    assert find_by_name("ViT-B-32__openai") not in able
