"""CLIP: picture → what the visual tower takes, text → tokens, tower output → vector.

The rules are Immich's (contract §4), down to truncation instead of rounding, because one pixel off
changes the vector.
"""

import logging
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image
from tokenizers import Tokenizer

from immich_ml_metal.errors import LoadFailed
from immich_ml_metal.tasks.images import Picture, resize
from immich_ml_metal.tasks.vectors import check_vector
from immich_ml_metal.types import FREE_LENGTH, Floats, Graph, Tensor

log = logging.getLogger(__name__)

ResizeMode = Literal["shortest", "squash"]

DEFAULT_CONTEXT_LENGTH = 77  # of every tower whose config names none (contract §4.2)

_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_PUNCTUATION = str.maketrans("", "", string.punctuation)  # the 32 ASCII marks SigLIP drops

# What the text towers call their inputs (contract §2.2): OpenCLIP's, and M-CLIP's two.
_TOKEN_INPUTS = ("text", "input_ids")
_MASK_INPUT = "attention_mask"

# What a text is padded to where each length costs a compilation and the graph takes any: most
# searches have fewer than 14 words.
_LENGTHS = (16, 32)

# FLORES-200 codes by the language tags of Immich's web client (contract §2.3). `jpn_Hira` is not a
# real code, but it is what the official service sends.
# fmt: off
NLLB_CODES: Mapping[str, str] = {
    "af": "afr_Latn", "ar": "arb_Arab", "az": "azj_Latn", "be": "bel_Cyrl", "bg": "bul_Cyrl",
    "ca": "cat_Latn", "cs": "ces_Latn", "da": "dan_Latn", "de": "deu_Latn", "el": "ell_Grek",
    "en": "eng_Latn", "es": "spa_Latn", "et": "est_Latn", "fa": "pes_Arab", "fi": "fin_Latn",
    "fr": "fra_Latn", "he": "heb_Hebr", "hi": "hin_Deva", "hr": "hrv_Latn", "hu": "hun_Latn",
    "hy": "hye_Armn", "id": "ind_Latn", "it": "ita_Latn", "ja": "jpn_Hira", "kmr": "kmr_Latn",
    "ko": "kor_Hang", "lb": "ltz_Latn", "lt": "lit_Latn", "lv": "lav_Latn", "mfa": "zsm_Latn",
    "mk": "mkd_Cyrl", "mn": "khk_Cyrl", "mr": "mar_Deva", "ms": "zsm_Latn", "nb-NO": "nob_Latn",
    "nn": "nno_Latn", "nl": "nld_Latn", "pl": "pol_Latn", "pt-BR": "por_Latn", "pt": "por_Latn",
    "ro": "ron_Latn", "ru": "rus_Cyrl", "sk": "slk_Latn", "sl": "slv_Latn", "sr-Cyrl": "srp_Cyrl",
    "sv": "swe_Latn", "ta": "tam_Taml", "te": "tel_Telu", "th": "tha_Thai", "tr": "tur_Latn",
    "uk": "ukr_Cyrl", "ur": "urd_Arab", "vi": "vie_Latn", "zh-CN": "zho_Hans",
    "zh-Hans": "zho_Hans", "zh-TW": "zho_Hant",
}
# fmt: on
_NLLB_FALLBACK = "eng_Latn"


# -- pictures --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class VisualConfig:
    """A model's `preprocess_cfg.json`.

    Attributes:
        side_px: the square the tower sees.
        mean, std: per channel, of pixels in 0..1.
        resample: Pillow filter.
        resize_mode: `shortest` scales the short side and crops the centre, `squash` ignores the
            aspect ratio.
    """

    side_px: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resample: Image.Resampling
    resize_mode: ResizeMode

    @classmethod
    def parse(cls, config: Mapping[str, Any], *, compat: str) -> "VisualConfig":
        """Read the file's JSON; `compat` 3.2 ignores its `resize_mode` and `interpolation`.

        Raises:
            LoadFailed: a value is missing or unknown.
        """
        try:
            size = config["size"]
            mean, std = (tuple(float(x) for x in config[key]) for key in ("mean", "std"))
            mode: ResizeMode = config.get("resize_mode") or "shortest"
            filter_name = config.get("interpolation") or "bicubic"
            if compat == "3.2":
                mode, filter_name = "shortest", "bicubic"
            side_px = int(size[0] if isinstance(size, list) else size)
            if mode not in ("shortest", "squash"):
                raise LoadFailed(f"preprocess_cfg.json: unknown resize_mode {mode!r}")
            if side_px < 1 or min(std) <= 0:
                raise LoadFailed(f"preprocess_cfg.json: size {size} or std {std} is not positive")
            return cls(
                side_px=side_px,
                mean=(mean[0], mean[1], mean[2]),
                std=(std[0], std[1], std[2]),
                resample=_FILTERS[filter_name],
                resize_mode=mode,
            )
        except (KeyError, IndexError, TypeError, ValueError) as exc:
            raise LoadFailed(f"preprocess_cfg.json: bad or missing value: {exc!r}") from exc


def resize_square(image: Image.Image, config: VisualConfig) -> Image.Image:
    """Bring an RGB picture to the tower's square.

    For `shortest`, only the pixels that survive the centre crop are computed: `box` is the crop in
    the source's frame, which gives the pixels of resize-then-crop at half the cost.
    """
    side = config.side_px
    if config.resize_mode == "squash":
        return resize(image, (side, side), config.resample)
    width, height = image.size
    if width < height:
        new_width, new_height = side, int(height / width * side)
    else:
        new_width, new_height = int(width / height * side), side
    left, right = _centre(width, new_width, side)
    top, bottom = _centre(height, new_height, side)
    return resize(image, (side, side), config.resample, box=(left, top, right, bottom))


def _centre(length: int, new_length: int, side: int) -> tuple[float, float]:
    """Where the centre crop of `side` of `new_length` pixels begins and ends among `length`."""
    start = int(new_length / 2 - side / 2)
    to_source = length / new_length
    return start * to_source, min((start + side) * to_source, length)


class ClipVisualModel:
    """Picture → unit vector (D,) float32."""

    def __init__(self, graph: Graph, config: VisualConfig, *, name: str, dim: int | None) -> None:
        self._graph = graph
        self._config = config
        self._name = name
        self._dim = dim
        self._input = graph.inputs[0]
        scale = 1 / (255 * np.array(config.std))
        offset = -np.array(config.mean) / np.array(config.std)
        self._scale = scale.astype(np.float32)[:, None, None]  # (3, 1, 1)
        self._offset = offset.astype(np.float32)[:, None, None]
        self.max_batch = graph.max_batch
        self.size_bytes = graph.size_bytes

    def preprocess(self, item: Picture) -> Tensor:
        """Picture → (S, S, 3) uint8 for a fused graph, else (3, S, S) float32, normalised."""
        square = np.asarray(resize_square(item.image, self._config))  # (S, S, 3)
        if self._input.dtype == np.uint8:
            return square
        blob: Floats = square.transpose(2, 0, 1) * self._scale + self._offset  # (3, S, S)
        return blob

    def infer(self, batch: Sequence[Tensor]) -> Sequence[Tensor]:
        """N squares → N vectors (D,)."""
        return list(self._graph.run({self._input.name: np.stack(batch)})[0])

    def postprocess(self, raw: Tensor, item: Picture) -> Floats:
        """Check the vector."""
        return check_vector(raw, name=self._name, dim=self._dim)

    def close(self) -> None:
        """Free the graph."""
        self._graph.close()


# -- texts -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SearchQuery:
    """A search text as the user typed it, and the caller's language tag."""

    text: str
    language: str | None = None


@dataclass(frozen=True, slots=True)
class TextConfig:
    """How a tower wants its text: token count, SigLIP's cleaning, NLLB's language prefix."""

    context_length: int
    canonicalize: bool
    language_prefix: bool

    @classmethod
    def parse(cls, config: Mapping[str, Any], *, name: str) -> "TextConfig":
        """Read the model's `config.json`; `name` is the cleaned model name.

        Raises:
            LoadFailed: a value is malformed.
        """
        try:
            text = config.get("text_cfg") or {}
            cleaning = (text.get("tokenizer_kwargs") or {}).get("clean")
            return cls(
                context_length=int(text.get("context_length") or DEFAULT_CONTEXT_LENGTH),
                canonicalize=cleaning == "canonicalize",
                language_prefix=name.startswith("nllb"),
            )
        except (AttributeError, TypeError, ValueError) as exc:
            raise LoadFailed(f"config.json: malformed text_cfg: {exc}") from exc


def clean_text(query: SearchQuery, config: TextConfig) -> str:
    """The text as the tokenizer gets it (contract §4.2, steps 1 to 3)."""
    text = " ".join(query.text.split())
    if config.canonicalize:
        text = text.translate(_PUNCTUATION).lower()
    if config.language_prefix and query.language is not None:
        text = nllb_code(query.language) + text
    return text


def nllb_code(language: str) -> str:
    """FLORES code of a language tag, of its first part, else English."""
    code = NLLB_CODES.get(language) or NLLB_CODES.get(language.split("-")[0])
    if code is None:
        log.warning("unknown language, taken for English language=%s", language[:16])
    return code or _NLLB_FALLBACK


def prepare_tokenizer(
    tokenizer: Tokenizer, tokenizer_config: Mapping[str, Any], config: TextConfig
) -> Tokenizer:
    """Make `tokenizer` cut and pad to the context length.

    Raises:
        LoadFailed: the padding token is not named or not in the vocabulary.
    """
    token = tokenizer_config.get("pad_token")
    token = token.get("content") if isinstance(token, dict) else token
    pad_id = tokenizer.token_to_id(token) if isinstance(token, str) else None
    if pad_id is None:
        raise LoadFailed(f"tokenizer_config.json: pad_token {token!r} is not in the vocabulary")
    tokenizer.enable_truncation(config.context_length)
    tokenizer.enable_padding(length=config.context_length, pad_token=token, pad_id=pad_id)
    return tokenizer


class ClipTextualModel:
    """Text → unit vector (D,) float32, in the space of the same model's pictures."""

    def __init__(
        self, graph: Graph, config: TextConfig, tokenizer: Tokenizer, *, name: str, dim: int | None
    ) -> None:
        """Raises LoadFailed when the graph wants more than tokens and their mask."""
        unknown = {spec.name for spec in graph.inputs} - {*_TOKEN_INPUTS, _MASK_INPUT}
        if unknown:
            raise LoadFailed(f"{name}: nothing is known for the inputs {sorted(unknown)}")
        self._graph = graph
        self._config = config
        self._tokenizer = tokenizer
        self._name = name
        self._dim = dim
        self._takes_any_length = FREE_LENGTH in graph.metadata
        self.max_batch = graph.max_batch
        self.size_bytes = graph.size_bytes

    def preprocess(self, item: SearchQuery) -> dict[str, Tensor]:
        """Text → what each of the graph's inputs takes, (context length,) integers each."""
        encoding = self._tokenizer.encode(clean_text(item, self._config))
        return {
            spec.name: np.array(
                encoding.attention_mask if spec.name == _MASK_INPUT else encoding.ids,
                dtype=spec.dtype,
            )
            for spec in self._graph.inputs
        }

    def infer(self, batch: Sequence[dict[str, Tensor]]) -> Sequence[Tensor]:
        """N token lists → N vectors (D,)."""
        feeds = {
            spec.name: np.stack([blob[spec.name] for blob in batch]) for spec in self._graph.inputs
        }
        if self._takes_any_length:
            feeds = {name: self._shorten(tokens) for name, tokens in feeds.items()}
        return list(self._graph.run(feeds)[0])

    def _shorten(self, tokens: Tensor) -> Tensor:
        """Drop what follows the end tokens, which have the highest number: nothing looks at it."""
        length = int(tokens.argmax(axis=1).max()) + 1
        if self._graph.fixed_shapes:
            length = next((n for n in _LENGTHS if n >= length), tokens.shape[1])
        return tokens[:, :length]

    def postprocess(self, raw: Tensor, item: SearchQuery) -> Floats:
        """Check the vector."""
        return check_vector(raw, name=self._name, dim=self._dim)

    def close(self) -> None:
        """Free the graph."""
        self._graph.close()
