from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from immich_ml_metal.backends.build import BUILDERS
from immich_ml_metal.catalog import (
    MULTILINGUAL,
    PARTS_OF,
    TASK_OF,
    Family,
    ModelSpec,
    all_models,
    clean_name,
    engine_setting,
    find_by_name,
    find_model,
    model_key,
    model_setting,
    parse_catalog,
    preload_setting,
)
from immich_ml_metal.errors import UnknownModel
from immich_ml_metal.settings import Settings
from immich_ml_metal.types import SLOTS, ModelKey, Part, Task

# How many search models Immich's own table (contract §2.1) has of each dimension.
DIMS = {512: 12, 640: 4, 768: 18, 1024: 14, 1152: 8, 1536: 2}


def test_every_half_has_its_settings_and_its_builder() -> None:
    preloads = {name for name in Settings.model_fields if name.startswith("preload_")}
    assert preloads == {preload_setting(slot) for slot in SLOTS}
    assert {model_setting(task) for task, _ in SLOTS} <= set(Settings.model_fields)
    assert set(BUILDERS) == set(SLOTS)
    engines = {name for name in Settings.model_fields if name.endswith("_engine")}
    assert engines == {engine_setting(slot) for slot in SLOTS}


def test_the_75_official_names_are_there_by_family() -> None:
    assert Counter(spec.family for spec in all_models()) == {
        Family.OPENCLIP: 54,
        Family.MCLIP: 4,
        Family.INSIGHTFACE: 4,
        Family.PADDLE: 13,
    }


def test_dimensions_are_immichs_own() -> None:
    found = Counter(spec.dim for spec in all_models() if spec.task is Task.CLIP)
    assert found == DIMS
    assert find_by_name("ViT-B-32__openai").dim == 512
    assert find_by_name("RN50x4__openai").dim == 640
    assert find_by_name("ViT-SO400M-16-SigLIP2-384__webli").dim == 1152
    assert find_by_name("nllb-clip-base-siglip__v1").dim == 768
    assert find_by_name("XLM-Roberta-Large-Vit-B-16Plus").dim == 640
    assert find_by_name("antelopev2").dim == 512
    assert find_by_name("PP-OCRv6_small").dim is None


@pytest.mark.parametrize("spec", all_models(), ids=lambda spec: spec.name)
def test_every_name_resolves_to_itself_in_its_own_family(spec: ModelSpec) -> None:
    assert spec.task is TASK_OF[spec.family]
    for part in PARTS_OF[spec.task]:
        assert find_model(spec.name, spec.task, part) is spec
        assert model_key(spec.name, spec.task, part) == ModelKey(spec.task, part, spec.name)
        assert spec.part_bytes[part] > 0
    assert spec.languages or spec.task is Task.FACES


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("ViT-B-32::openai", "ViT-B-32__openai"),
        ("immich-app/ViT-B-32__openai", "ViT-B-32__openai"),
        ("a/b/buffalo_l", "buffalo_l"),
        (r"CH\PP-OCRv5", "CH_PP-OCRv5"),
        ("buffalo.l", "buffalol"),
        ("../../etc/passwd", "passwd"),
        ("..", ""),
        ("", ""),
    ],
)
def test_names_are_cleaned_as_the_official_service_cleans_them(raw: str, clean: str) -> None:
    assert clean_name(raw) == clean


@given(st.text())
def test_a_clean_name_cannot_leave_a_folder_and_stays_clean(raw: str) -> None:
    name = clean_name(raw)
    assert not set(name) & set("/\\:.")
    assert clean_name(name) == name


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("vit-b-32", "ViT-B-32__openai"),
        ("siglip2", "ViT-B-16-SigLIP2__webli"),
        ("Bufalo_L", "buffalo_l"),
    ],
)
def test_near_names_are_found_whatever_the_case_and_from_a_part(typed: str, meant: str) -> None:
    with pytest.raises(UnknownModel, match=f"near names: .*{meant}"):
        find_by_name(typed)


def test_an_unknown_name_is_refused_with_near_names_and_the_name_as_sent() -> None:
    with pytest.raises(UnknownModel, match=r"'ViT-B-32:openai'.*ViT-B-32__openai"):
        find_model("ViT-B-32:openai", Task.CLIP, Part.VISUAL)


def test_names_are_case_sensitive() -> None:
    with pytest.raises(UnknownModel):
        find_model("BUFFALO_L", Task.FACES, Part.DETECTION)


def test_a_known_name_for_another_task_is_refused_saying_what_it_is() -> None:
    with pytest.raises(UnknownModel, match="'buffalo_l' is a face model"):
        find_model("buffalo_l", Task.OCR, Part.DETECTION)
    with pytest.raises(UnknownModel, match="is a search model"):
        find_model("ViT-B-32__openai", Task.CLIP, Part.DETECTION)


def test_multilingual_models_say_so() -> None:
    assert find_by_name("nllb-clip-large-siglip__mrl").languages == (MULTILINGUAL,)
    assert find_by_name("ViT-B-32__openai").languages == ("en",)
    assert "ja" not in find_by_name("PP-OCRv6_tiny").languages
    assert "ja" in find_by_name("PP-OCRv6_medium").languages


ROW = 'dim = 512, px = 224, resize = "shortest", tokenizer = "t", context = 77, languages = "en"'


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        (f'"m" = {{ {ROW}, visual_bytes = 1, textual_bytes = 1 }}', "licence"),
        (f'"m" = {{ {ROW}, licence = "MIT", visual_bytes = 1 }}', "textual_bytes"),
        (f'"m" = {{ {ROW}, licence = "MIT", visual_bytes = 0, textual_bytes = 1 }}', "positive"),
        (f'"m.m" = {{ {ROW} }}', "clean name"),
        (
            f'"m" = {{ {ROW.replace("shortest", "fit")}, licence = "MIT",'
            " visual_bytes = 1, textual_bytes = 1 }",
            "resize mode 'fit'",
        ),
    ],
)
def test_a_bad_entry_is_named(row: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        parse_catalog(f'[languages]\nen = ["en"]\n[openclip]\n{row}\n')


def test_a_malformed_digest_is_named() -> None:
    text = (
        '[languages]\nen = ["en"]\n[modelscope]\nf = { path = "x", bytes = 1, sha256 = "abc" }\n'
        '[paddle]\n"p" = { languages = "en", licence = "x", det = "f", rec = "f" }\n'
    )
    with pytest.raises(ValueError, match="p: a SHA-256"):
        parse_catalog(text)
