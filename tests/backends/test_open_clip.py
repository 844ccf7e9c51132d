"""The open_clip engine, with doubles of open_clip and torch that compute with NumPy."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from immich_ml_metal.backends.open_clip import (
    Libraries,
    OpenClipEngine,
    split_name,
    torch_device,
)
from immich_ml_metal.catalog import model_key
from immich_ml_metal.errors import InferenceError, LoadFailed, ModelUnavailable, UnknownModel
from immich_ml_metal.settings import Settings
from immich_ml_metal.tasks.clip import SearchQuery, VisualConfig, resize_square
from immich_ml_metal.tasks.images import Picture
from immich_ml_metal.types import ModelKey, Part, Task

NAME = "open_clip/coca_ViT-B-32__laion2b_s13b_b90k"
DIM, SIDE, CONTEXT = 4, 16, 8
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)


class Values:
    """A torch tensor, as far as it is used."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self.array = array

    def to(self, device: str) -> "Values":
        assert device in ("cpu", "mps")
        return self

    def float(self) -> "Values":
        return self

    def cpu(self) -> "Values":
        return self

    def numpy(self) -> np.ndarray[Any, Any]:
        return self.array


class Weight:
    """A torch parameter of a number of float32 values."""

    def __init__(self, count: int) -> None:
        self.count = count

    def numel(self) -> int:
        return self.count

    def element_size(self) -> int:
        return 4


def unit(rows: np.ndarray[Any, Any]) -> Values:
    vectors = rows.reshape(len(rows), -1)[:, :DIM].astype(np.float32) + 1
    return Values(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


class Towers:
    """An open_clip model: the first four numbers of a row, made a unit vector."""

    def __init__(self) -> None:
        self.visual = SimpleNamespace(parameters=lambda: [Weight(10)])
        self.seen: list[np.ndarray[Any, Any]] = []
        self.is_eval = False

    def parameters(self) -> list[Weight]:
        return [Weight(10), Weight(3)]

    def eval(self) -> None:
        self.is_eval = True

    def encode_image(self, batch: Values, *, normalize: bool) -> Values:
        assert normalize
        self.seen.append(batch.array)
        return unit(batch.array)

    def encode_text(self, batch: Values, *, normalize: bool) -> Values:
        assert normalize
        self.seen.append(batch.array)
        return unit(batch.array)


class OpenClip:
    """The functions of open_clip that are used, with one known model."""

    def __init__(self, *, breaks: bool = False) -> None:
        self.made: list[Towers] = []
        self.calls: list[dict[str, Any]] = []
        self._breaks = breaks

    def list_pretrained_tags_by_model(self, architecture: str) -> list[str]:
        return {"coca_ViT-B-32": ["laion2b_s13b_b90k"]}.get(architecture, [])

    def create_model(self, architecture: str, **options: Any) -> Towers:
        if self._breaks:
            raise RuntimeError("the checkpoint is cut short")
        self.calls.append({"architecture": architecture, **options})
        self.made.append(Towers())
        return self.made[-1]

    def get_tokenizer(self, architecture: str, *, cache_dir: str) -> Any:
        def tokenize(texts: Sequence[str]) -> np.ndarray[Any, Any]:
            rows = [[ord(letter) for letter in text.ljust(CONTEXT)[:CONTEXT]] for text in texts]
            return np.array(rows)

        return tokenize

    def get_model_config(self, architecture: str) -> dict[str, Any]:
        return {"embed_dim": DIM, "text_cfg": {"context_length": CONTEXT}}

    def get_model_preprocess_cfg(self, model: Towers) -> dict[str, Any]:
        return {
            "size": (SIDE, SIDE),
            "mean": MEAN,
            "std": STD,
            "mode": "RGB",
            "interpolation": "bicubic",
            "resize_mode": "squash",
            "fill_color": 0,
        }

    def get_pretrained_cfg(self, architecture: str, weights: str) -> dict[str, str]:
        return {"hf_hub": "laion/coca/"}


class Mode:
    """torch.inference_mode: outside of it a run would keep what gradients need."""

    depth = 0

    def __enter__(self) -> None:
        Mode.depth += 1

    def __exit__(self, *_: object) -> None:
        Mode.depth -= 1


def torch_double(*, mps: bool = False, fails: bool = False) -> Any:
    def from_numpy(array: np.ndarray[Any, Any]) -> Values:
        if fails:
            raise RuntimeError("MPS backend out of memory")
        assert Mode.depth == 1
        return Values(array)

    available = SimpleNamespace(is_available=lambda: mps)
    return SimpleNamespace(
        backends=SimpleNamespace(mps=available),
        inference_mode=Mode,
        from_numpy=from_numpy,
    )


class Hub:
    """huggingface_hub's cache: what it holds, by repository."""

    def __init__(self, *cached: str) -> None:
        self.cached = cached

    def try_to_load_from_cache(self, repository: str, file: str, *, cache_dir: str) -> str | None:
        is_here = repository in self.cached and file.endswith(".safetensors")
        return f"{cache_dir}/{file}" if is_here else None


def engine(
    folder: Path,
    open_clip: OpenClip | None = None,
    torch: Any = None,
    hub: Hub | None = None,
    **settings: Any,
) -> OpenClipEngine:
    libraries = Libraries(torch or torch_double(), open_clip or OpenClip(), hub or Hub())
    return OpenClipEngine(Settings(models_dir=folder, **settings), libraries)


def key(part: Part, name: str = NAME) -> ModelKey:
    return ModelKey(Task.CLIP, part, name)


def picture() -> Picture:
    pixels = np.random.default_rng(3).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    return Picture(Image.fromarray(pixels))


def test_pictures_go_through_the_projects_own_preprocessing(tmp_path: Path) -> None:
    open_clip = OpenClip()
    model = engine(tmp_path, open_clip).load(key(Part.VISUAL), None)
    [raw] = model.infer([model.preprocess(picture())])
    vector = model.postprocess(raw, picture())
    config = VisualConfig(SIDE, MEAN, STD, Image.Resampling.BICUBIC, "squash")
    square = np.asarray(resize_square(picture().image, config)) / 255
    expected = ((square - MEAN) / STD).transpose(2, 0, 1)
    assert open_clip.made[0].seen[0][0] == pytest.approx(expected, abs=1e-5)
    assert np.linalg.norm(vector) == pytest.approx(1)
    assert open_clip.made[0].is_eval


def test_texts_are_cleaned_and_tokenised_by_open_clip(tmp_path: Path) -> None:
    open_clip = OpenClip()
    model = engine(tmp_path, open_clip).load(key(Part.TEXTUAL), None)
    item = SearchQuery("  a \n dog ")
    [raw] = model.infer([model.preprocess(item)])
    assert open_clip.made[0].seen[0].tolist() == [[ord(letter) for letter in "a dog   "]]
    assert model.postprocess(raw, item).shape == (DIM,)


def test_both_halves_share_the_weights_until_both_are_closed(tmp_path: Path) -> None:
    open_clip = OpenClip()
    made = engine(tmp_path, open_clip)
    visual, textual = (made.load(key(part), None) for part in (Part.VISUAL, Part.TEXTUAL))
    assert (visual.size_bytes, textual.size_bytes) == (40, 12)
    visual.close()
    visual = made.load(key(Part.VISUAL), None)
    assert len(open_clip.made) == 1
    visual.close()
    textual.close()
    made.load(key(Part.VISUAL), None)
    assert len(open_clip.made) == 2


def test_weights_are_kept_in_the_models_folder(tmp_path: Path) -> None:
    open_clip = OpenClip()
    engine(tmp_path, open_clip).load(key(Part.VISUAL), None)
    assert open_clip.calls == [
        {
            "architecture": "coca_ViT-B-32",
            "pretrained": "laion2b_s13b_b90k",
            "device": "cpu",
            "cache_dir": str(tmp_path / "open_clip"),
        }
    ]


def test_the_metal_gpu_is_used_where_there_is_one() -> None:
    assert torch_device(torch_double(mps=True)) == "mps"
    assert torch_device(torch_double(mps=False)) == "cpu"


@pytest.mark.parametrize("name", ["ViT-B-32__openai", "open_clip/ViT-B-32", "open_clip/__x"])
def test_no_other_spelling_is_served(tmp_path: Path, name: str) -> None:
    with pytest.raises(UnknownModel, match="is not spelled open_clip/"):
        engine(tmp_path).load(key(Part.VISUAL, name), None)


def test_weights_that_open_clip_does_not_have_are_unknown(tmp_path: Path) -> None:
    with pytest.raises(UnknownModel, match=r"no weights 'openai' for .*: laion2b_s13b_b90k"):
        engine(tmp_path).load(key(Part.VISUAL, "open_clip/coca_ViT-B-32__openai"), None)


def test_offline_only_what_was_fetched_before_is_served(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match="ML_OFFLINE forbids"):
        engine(tmp_path, offline=True).load(key(Part.VISUAL), None)
    engine(tmp_path, hub=Hub("laion/coca"), offline=True).load(key(Part.VISUAL), None)


def test_what_open_clip_cannot_load_fails_with_its_words(tmp_path: Path) -> None:
    with pytest.raises(LoadFailed, match=f"cannot load {NAME}: the checkpoint is cut short"):
        engine(tmp_path, OpenClip(breaks=True)).load(key(Part.VISUAL), None)


def test_a_failing_gpu_is_an_error(tmp_path: Path) -> None:
    model = engine(tmp_path, torch=torch_double(fails=True)).load(key(Part.VISUAL), None)
    with pytest.raises(InferenceError, match="MPS backend out of memory"):
        model.infer([model.preprocess(picture())])


def test_a_spelled_out_name_keeps_its_spelling_on_the_wire() -> None:
    assert model_key(NAME, Task.CLIP, Part.VISUAL) == key(Part.VISUAL)
    assert split_name(NAME) == ("coca_ViT-B-32", "laion2b_s13b_b90k")


def test_a_catalogue_name_is_immichs_export_however_it_is_prefixed() -> None:
    found = model_key("open_clip/ViT-B-32__openai", Task.CLIP, Part.VISUAL)
    assert found == key(Part.VISUAL, "ViT-B-32__openai")


def test_a_name_without_the_prefix_stays_unknown() -> None:
    with pytest.raises(UnknownModel):
        model_key("coca_ViT-B-32__laion2b_s13b_b90k", Task.CLIP, Part.VISUAL)
