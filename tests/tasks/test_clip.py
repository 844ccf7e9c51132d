import string
from typing import Any

import numpy as np
import pytest
from doubles.graph import FakeGraph, spec
from doubles.pictures import grainy_picture
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from immich_ml_metal.errors import InvalidOutput, LoadFailed
from immich_ml_metal.tasks.clip import (
    NLLB_CODES,
    ClipTextualModel,
    ClipVisualModel,
    SearchQuery,
    TextConfig,
    VisualConfig,
    clean_text,
    nllb_code,
    prepare_tokenizer,
    resize_square,
)
from immich_ml_metal.tasks.images import Picture
from immich_ml_metal.tasks.vectors import check_finite, check_vector
from immich_ml_metal.types import FREE_LENGTH, Floats

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HOSTED: dict[str, Any] = {
    "size": [224, 224],
    "mode": "RGB",
    "mean": list(MEAN),
    "std": list(STD),
    "interpolation": "bicubic",
    "resize_mode": "shortest",
    "fill_color": 0,
}


def config(side_px: int = 32, resize_mode: str = "shortest", **changes: Any) -> VisualConfig:
    values = HOSTED | {"size": side_px, "resize_mode": resize_mode} | changes
    return VisualConfig.parse(values, compat="3.3")


# -- preprocess_cfg.json ---------------------------------------------------------------------------


def test_the_hosted_file_is_read() -> None:
    assert VisualConfig.parse(HOSTED, compat="3.3") == VisualConfig(
        side_px=224,
        mean=MEAN,
        std=STD,
        resample=Image.Resampling.BICUBIC,
        resize_mode="shortest",
    )


def test_missing_modes_are_shortest_and_bicubic() -> None:
    bare = {key: HOSTED[key] for key in ("size", "mean", "std")}
    assert VisualConfig.parse(bare, compat="3.3") == VisualConfig.parse(HOSTED, compat="3.3")


@pytest.mark.parametrize("compat", ["3.2", "3.3"])
def test_only_the_newer_rules_honour_squash_and_interpolation(compat: str) -> None:
    values = HOSTED | {"resize_mode": "squash", "interpolation": "bilinear"}
    parsed = VisualConfig.parse(values, compat=compat)
    expected = {
        "3.2": ("shortest", Image.Resampling.BICUBIC),
        "3.3": ("squash", Image.Resampling.BILINEAR),
    }
    assert (parsed.resize_mode, parsed.resample) == expected[compat]


@pytest.mark.parametrize(
    "changes",
    [
        {"resize_mode": "longest"},
        {"interpolation": "random"},
        {"side_px": None},
        {"side_px": []},
        {"side_px": 0},
        {"side_px": -1},
        {"side_px": "large"},
        {"mean": 0.5},
        {"mean": [0.5, 0.5]},
        {"mean": ["a", "b", "c"]},
        {"std": [0.5, 0, 0.5]},
        {"std": [0.5, -0.1, 0.5]},
    ],
    ids=str,
)
def test_a_malformed_file_fails_the_load(changes: dict[str, Any]) -> None:
    with pytest.raises(LoadFailed, match=r"preprocess_cfg\.json"):
        config(**changes)


def test_the_smallest_values_are_read() -> None:
    read = config(side_px=1, std=[0.5, 1e-9, 0.5])
    assert (read.side_px, read.std) == (1, (0.5, 1e-9, 0.5))


# -- resize and crop (contract §4.1) ---------------------------------------------------------------


def resize_then_crop(image: Image.Image, side: int) -> Image.Image:
    """The rule as the contract words it: resize everything, truncate, crop the centre.

    Across first, then down, as the Pillow of the official service does.
    """
    width, height = image.size
    if width < height:
        size = (side, int(height / width * side))
    else:
        size = (int(width / height * side), side)
    across = image.resize((size[0], height), Image.Resampling.BICUBIC)
    resized = across.resize(size, Image.Resampling.BICUBIC)
    left, top = int(size[0] / 2 - side / 2), int(size[1] / 2 - side / 2)
    return resized.crop((left, top, left + side, top + side))


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(1, 400),
    height=st.integers(1, 400),
    side=st.sampled_from([32, 33, 64, 224]),
    seed=st.integers(0, 9),
)
def test_shortest_equals_resize_then_crop(width: int, height: int, side: int, seed: int) -> None:
    image = grainy_picture(width, height, seed)
    square = resize_square(image, config(side))
    assert square.size == (side, side)
    expected = np.asarray(resize_then_crop(image, side)).astype(int)
    difference = np.abs(np.asarray(square) - expected)
    assert difference.max() <= 1
    assert np.mean(difference == 0) >= 0.99


def test_shortest_equals_resize_then_crop_on_a_preview() -> None:
    image = grainy_picture(2161, 1440)
    difference = np.abs(
        np.asarray(resize_square(image, config(224))).astype(int)
        - np.asarray(resize_then_crop(image, 224))
    )
    assert difference.max() <= 1
    assert np.mean(difference == 0) >= 0.999


@pytest.mark.parametrize("size", [(1, 200), (200, 1), (1, 1), (20_000, 3), (3, 20_000)])
@pytest.mark.parametrize("resize_mode", ["shortest", "squash"])
def test_extreme_shapes_give_the_square(size: tuple[int, int], resize_mode: str) -> None:
    image = Image.new("RGB", size, "#102030")
    square = resize_square(image, config(224, resize_mode))
    assert square.size == (224, 224)
    assert square.getcolors() == [(224 * 224, (16, 32, 48))]


def test_squash_ignores_the_aspect_ratio() -> None:
    image = grainy_picture(90, 40)
    square = resize_square(image, config(32, "squash"))
    across = image.resize((32, 40), Image.Resampling.BICUBIC)
    assert square.tobytes() == across.resize((32, 32), Image.Resampling.BICUBIC).tobytes()


def test_the_named_filter_is_used() -> None:
    image = grainy_picture(90, 40)
    square = resize_square(image, config(32, "squash", interpolation="bilinear"))
    across = image.resize((32, 40), Image.Resampling.BILINEAR)
    assert square.tobytes() == across.resize((32, 32), Image.Resampling.BILINEAR).tobytes()
    assert square.tobytes() != resize_square(image, config(32, "squash")).tobytes()


# -- the visual model ------------------------------------------------------------------------------


def unit_rows(feeds: dict[str, Any]) -> list[Any]:
    """One vector of three numbers per picture: its mean per channel."""
    (batch,) = feeds.values()
    axes = (1, 2) if batch.shape[-1] == 3 else (2, 3)
    return [batch.astype(np.float32).mean(axis=axes), np.zeros(1)]


def test_a_float_graph_gets_normalised_planes() -> None:
    graph = FakeGraph(unit_rows, inputs=[spec("image", np.float32, [None, 3, 32, 32])])
    model = ClipVisualModel(graph, config(32), name="m", dim=3)
    image = grainy_picture(50, 40)
    blob = model.preprocess(Picture(image))
    square = np.asarray(resize_then_crop(image, 32)).astype(np.float64)
    expected = ((square / 255 - MEAN) / STD).transpose(2, 0, 1)
    assert blob.shape == (3, 32, 32)
    assert blob.dtype == np.float32
    np.testing.assert_allclose(blob, expected, atol=0.02)  # one grey level is 0.015
    assert np.median(np.abs(blob - expected)) < 1e-6


def test_a_fused_graph_gets_the_bytes() -> None:
    graph = FakeGraph(unit_rows, inputs=[spec("image", np.uint8, [1, 32, 32, 3])])
    model = ClipVisualModel(graph, config(32), name="m", dim=3)
    picture = Picture(grainy_picture(50, 40))
    blob = model.preprocess(picture)
    assert blob.shape == (32, 32, 3)
    assert blob.dtype == np.uint8
    np.testing.assert_array_equal(blob, np.asarray(resize_square(picture.image, config(32))))


def test_pictures_run_as_one_batch_under_the_graphs_input_name() -> None:
    graph = FakeGraph(unit_rows, inputs=[spec("image", np.uint8)])
    model = ClipVisualModel(graph, config(32), name="m", dim=3)
    pictures = [Picture(Image.new("RGB", (32, 32), (level, 0, 7))) for level in (10, 20)]
    raw = model.infer([model.preprocess(picture) for picture in pictures])
    vectors = [model.postprocess(*pair) for pair in zip(raw, pictures, strict=True)]
    assert [vector.tolist() for vector in vectors] == [[10, 0, 7], [20, 0, 7]]
    assert [fed["image"].shape for fed in graph.fed] == [(2, 32, 32, 3)]
    assert (model.max_batch, model.size_bytes) == (4, 1234)


def test_close_frees_the_graph() -> None:
    graph = FakeGraph(unit_rows)
    ClipVisualModel(graph, config(32), name="m", dim=3).close()
    assert graph.is_closed


# -- the last look at the values -------------------------------------------------------------------


def test_a_vector_of_the_right_length_passes_as_float32() -> None:
    vector = check_vector(np.array([[1, 2]], dtype=np.float16), name="m", dim=2)
    assert vector.tolist() == [1, 2]
    assert vector.dtype == np.float32
    assert check_vector(np.zeros(7), name="m", dim=None).shape == (7,)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1, 2, 3], "m gave 3 values, the model's dimension is 2"),
        ([1, np.nan], "m gave 1 values that are not finite"),
        ([np.inf, -np.inf], "m gave 2 values that are not finite"),
    ],
)
def test_a_bad_vector_is_an_error(values: list[float], message: str) -> None:
    with pytest.raises(InvalidOutput, match=message):
        check_vector(np.array(values, np.float32), name="m", dim=2)


def test_a_map_with_a_hole_is_an_error() -> None:
    with pytest.raises(InvalidOutput, match="m gave 1 values that are not finite"):
        check_finite(np.array([[0, np.nan]], np.float32), name="m")
    assert check_finite(np.zeros((2, 3), np.float16), name="m").dtype == np.float32


# -- config.json -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "name", "expected"),
    [
        ({}, "XLM-Roberta-Large-Vit-B-32", TextConfig(77, False, False)),
        ({"text_cfg": {"context_length": 64}}, "ViT-B-32__openai", TextConfig(64, False, False)),
        (
            {"text_cfg": {"context_length": 64, "tokenizer_kwargs": {"clean": "canonicalize"}}},
            "ViT-B-16-SigLIP2__webli",
            TextConfig(64, True, False),
        ),
        (
            {"text_cfg": {"tokenizer_kwargs": {"clean": "whitespace"}, "context_length": None}},
            "nllb-clip-base-siglip__v1",
            TextConfig(77, False, True),
        ),
    ],
)
def test_the_text_rules_come_from_the_models_config(
    values: dict[str, Any], name: str, expected: TextConfig
) -> None:
    assert TextConfig.parse(values, name=name) == expected


@pytest.mark.parametrize(
    "text", ["x", {"context_length": "many"}, {"tokenizer_kwargs": ["clean"]}], ids=str
)
def test_a_malformed_text_config_fails_the_load(text: Any) -> None:
    with pytest.raises(LoadFailed, match=r"config\.json: malformed text_cfg"):
        TextConfig.parse({"text_cfg": text}, name="m")


# -- cleaning and language (contract §4.2) ---------------------------------------------------------

PLAIN, SIGLIP, NLLB = (
    TextConfig(77, False, False),
    TextConfig(64, True, False),
    TextConfig(77, False, True),
)


@pytest.mark.parametrize(
    ("config", "text", "language", "expected"),
    [
        (PLAIN, "  a\tb\n\u3000c  ", None, "a b c"),
        (PLAIN, "A - B!", "de", "A - B!"),  # the language is for NLLB only
        (PLAIN, " ", None, ""),
        (SIGLIP, "A - B!", None, "a  b"),  # not collapsed again
        (SIGLIP, "ÄÖ «Ω» don't", None, "äö «ω» dont"),
        (SIGLIP, string.punctuation, None, ""),
        (NLLB, "ein  Hund", "de", "deu_Latnein Hund"),
        (NLLB, "ein Hund", "de-CH", "deu_Latnein Hund"),
        (NLLB, "a dog", "en-null", "eng_Latna dog"),
        (NLLB, "a dog", "xx", "eng_Latna dog"),
        (NLLB, "a dog", "", "eng_Latna dog"),
        (NLLB, "a dog", None, "a dog"),
    ],
)
def test_a_text_is_cleaned(
    config: TextConfig, text: str, language: str | None, expected: str
) -> None:
    assert clean_text(SearchQuery(text, language), config) == expected


def test_the_language_table_is_immichs() -> None:
    assert len(NLLB_CODES) == 56
    samples = ["ja", "zh-CN", "zh-TW", "zh-Hans", "nb-NO", "sr-Cyrl", "mfa", "pt-BR", "kmr", "af"]
    assert [nllb_code(tag) for tag in samples] == [
        "jpn_Hira",
        "zho_Hans",
        "zho_Hant",
        "zho_Hans",
        "nob_Latn",
        "srp_Cyrl",
        "zsm_Latn",
        "por_Latn",
        "kmr_Latn",
        "afr_Latn",
    ]


# -- tokens ----------------------------------------------------------------------------------------

VOCABULARY = {"<s>": 0, "</s>": 1, "<pad>": 2, "<unk>": 3, "a": 4, "dog": 5}


def tokenizer() -> Tokenizer:
    made = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return made


def textual(*inputs: str, context_length: int = 6) -> tuple[ClipTextualModel, FakeGraph]:
    config = TextConfig(context_length, False, False)
    graph = FakeGraph(
        lambda feeds: [next(iter(feeds.values())).astype(np.float32)],
        inputs=[spec(name, np.int32, [None, context_length]) for name in inputs],
    )
    ready = prepare_tokenizer(tokenizer(), {"pad_token": "<pad>"}, config)
    return ClipTextualModel(graph, config, ready, name="m", dim=context_length), graph


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("a dog", [0, 4, 5, 1, 2, 2]),
        ("", [0, 1, 2, 2, 2, 2]),
        (" ", [0, 1, 2, 2, 2, 2]),
        ("dog " * 500, [0, 5, 5, 5, 5, 1]),  # cut, and still closed
    ],
)
def test_tokens_are_padded_and_cut_to_the_context(text: str, ids: list[int]) -> None:
    model, _ = textual("text")
    tokens = model.preprocess(SearchQuery(text))
    assert tokens["text"].tolist() == ids
    assert tokens["text"].dtype == np.int32


def lengths_fed(texts: list[str], *, fixed_shapes: bool) -> tuple[int, ...]:
    """The shape that a tower for any length is fed; its end token has the highest number."""
    graph = FakeGraph(
        lambda feeds: [feeds["text"].astype(np.float32)],
        inputs=[spec("text", np.int32, [None, None])],
        fixed_shapes=fixed_shapes,
    )
    graph.metadata = {FREE_LENGTH: "1"}
    words = models.WordLevel({"<pad>": 0, "a": 1, "dog": 2, "<end>": 9}, unk_token="<pad>")
    made = Tokenizer(words)
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    end = [("<end>", 9)]
    made.post_processor = processors.TemplateProcessing(single="$A <end>", special_tokens=end)
    config = TextConfig(40, False, False)
    ready = prepare_tokenizer(made, {"pad_token": "<pad>"}, config)
    model = ClipTextualModel(graph, config, ready, name="m", dim=None)
    model.infer([model.preprocess(SearchQuery(text)) for text in texts])
    return graph.fed[0]["text"].shape


@pytest.mark.parametrize(
    ("texts", "fixed_shapes", "shape"),
    [
        (["a dog"], False, (1, 3)),
        ([""], False, (1, 1)),
        (["a dog", "a a a a dog"], False, (2, 6)),
        (["a " * 100], False, (1, 40)),
        (["a dog"], True, (1, 16)),
        (["a " * 15], True, (1, 16)),
        (["a " * 16], True, (1, 32)),
        (["a " * 32], True, (1, 40)),
    ],
)
def test_a_tower_for_any_length_is_fed_no_padding_behind_the_longest_text(
    texts: list[str], fixed_shapes: bool, shape: tuple[int, ...]
) -> None:
    assert lengths_fed(texts, fixed_shapes=fixed_shapes) == shape


def test_a_tower_with_a_mask_is_told_what_is_padding() -> None:
    model, graph = textual("input_ids", "attention_mask")
    items = [SearchQuery("a dog"), SearchQuery("dog")]
    raw = model.infer([model.preprocess(item) for item in items])
    assert graph.fed[0]["input_ids"].tolist() == [[0, 4, 5, 1, 2, 2], [0, 5, 1, 2, 2, 2]]
    assert graph.fed[0]["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0]]
    assert model.postprocess(raw[1], items[1]).tolist() == [0, 5, 1, 2, 2, 2]


def test_an_input_nothing_is_known_for_fails_the_load() -> None:
    with pytest.raises(LoadFailed, match="token_type_ids"):
        textual("input_ids", "token_type_ids")


def test_a_text_model_closes_its_graph_and_tells_its_size() -> None:
    model, graph = textual("text")
    model.close()
    assert graph.is_closed
    assert (model.max_batch, model.size_bytes) == (4, 1234)


@pytest.mark.parametrize("pad_token", ["<pad>", {"content": "<pad>", "lstrip": False}])
def test_the_pad_token_may_be_a_string_or_an_object(pad_token: Any) -> None:
    ready = prepare_tokenizer(tokenizer(), {"pad_token": pad_token}, TextConfig(4, False, False))
    assert ready.encode("a").ids == [0, 4, 1, 2]


@pytest.mark.parametrize("pad_token", [None, "<nothing>", {"id": 2}, 2])
def test_an_unknown_pad_token_fails_the_load(pad_token: Any) -> None:
    with pytest.raises(LoadFailed, match="pad_token"):
        prepare_tokenizer(tokenizer(), {"pad_token": pad_token}, TextConfig(4, False, False))


def test_float_vectors_of_a_half_precision_graph_are_widened() -> None:
    graph = FakeGraph(lambda _: [np.array([[0.1, 0.2]], np.float16)])
    model = ClipVisualModel(graph, config(32), name="m", dim=2)
    vector: Floats = model.postprocess(model.infer([np.zeros(3)])[0], Picture(grainy_picture(3, 3)))
    assert vector.dtype == np.float32
