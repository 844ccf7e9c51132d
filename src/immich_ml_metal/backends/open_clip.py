"""open_clip's own weights, for CLIP models that Immich does not export: the last resort.

Only names spelled `open_clip/<architecture>__<weights>` are served, and only with
`ML_CLIP_ENGINE = open_clip`; a catalogue name never is, because its vectors would not be Immich's.
"""

import importlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from immich_ml_metal.backends.base import AnyModel
from immich_ml_metal.backends.device import Device
from immich_ml_metal.catalog import OPEN_CLIP_PREFIX
from immich_ml_metal.errors import InferenceError, LoadFailed, ModelUnavailable, UnknownModel
from immich_ml_metal.settings import Settings
from immich_ml_metal.tasks.clip import (
    ClipVisualModel,
    SearchQuery,
    TextConfig,
    VisualConfig,
    clean_text,
)
from immich_ml_metal.tasks.vectors import check_vector
from immich_ml_metal.types import Floats, ModelFiles, ModelKey, Part, Tensor, TensorSpec

log = logging.getLogger(__name__)

MAX_BATCH = 8
WEIGHT_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")


@dataclass(frozen=True, slots=True)
class Libraries:
    """torch, open_clip and huggingface_hub. Any: the first two are optional and untyped."""

    torch: Any
    open_clip: Any
    hub: Any


def load_libraries() -> Libraries:
    """Import the extra.

    Raises:
        ImportError: the extra `open-clip` is not installed.
    """
    names = ("torch", "open_clip", "huggingface_hub")
    torch, open_clip, hub = (importlib.import_module(name) for name in names)
    return Libraries(torch, open_clip, hub)


def torch_device(torch: Any) -> str:
    """Choose the Metal GPU where there is one, else the CPU."""
    return "mps" if torch.backends.mps.is_available() else "cpu"


def split_name(name: str) -> tuple[str, str]:
    """Split `open_clip/<architecture>__<weights>`.

    Raises:
        UnknownModel: the name is not of this form.
    """
    architecture, separator, weights = name.removeprefix(OPEN_CLIP_PREFIX).partition("__")
    if not (name.startswith(OPEN_CLIP_PREFIX) and architecture and separator and weights):
        raise UnknownModel(
            f"{name!r} is not spelled {OPEN_CLIP_PREFIX}<architecture>__<weights>; with "
            "ML_CLIP_ENGINE = open_clip no other name is served"
        )
    return architecture, weights


class Towers:
    """One open_clip model with both towers. Device thread only."""

    def __init__(self, libraries: Libraries, name: str, settings: Settings) -> None:
        """Raises UnknownModel, ModelUnavailable or LoadFailed."""
        self._torch = libraries.torch
        self.device = torch_device(libraries.torch)
        cache = settings.models_dir.expanduser() / "open_clip"
        architecture, weights = _find(libraries, name, cache, offline=settings.offline)
        try:
            self.model = libraries.open_clip.create_model(
                architecture, pretrained=weights, device=self.device, cache_dir=str(cache)
            )
            self.tokenizer = libraries.open_clip.get_tokenizer(architecture, cache_dir=str(cache))
            self.config = libraries.open_clip.get_model_config(architecture)
            self.preprocess = libraries.open_clip.get_model_preprocess_cfg(self.model)
        except Exception as exc:  # open_clip lets its many libraries' errors through
            raise LoadFailed(f"open_clip cannot load {name}: {exc}") from exc
        self.model.eval()
        log.info("open_clip loaded model=%s device=%s", name, self.device)

    def encode(self, method: str, rows: Tensor) -> Floats:
        """Run one tower: (N, ...) → (N, D) unit rows.

        Raises:
            InferenceError: torch failed.
        """
        try:
            with self._torch.inference_mode():
                batch = self._torch.from_numpy(rows).to(self.device)
                vectors = getattr(self.model, method)(batch, normalize=True)
                return np.asarray(vectors.float().cpu().numpy(), np.float32)
        except RuntimeError as exc:
            raise InferenceError(f"open_clip: {exc}") from exc

    def size_bytes(self, part: Part) -> int:
        """Weights of one tower."""
        visual = _bytes_of(self.model.visual)
        return visual if part is Part.VISUAL else _bytes_of(self.model) - visual


def _find(libraries: Libraries, name: str, cache: Path, *, offline: bool) -> tuple[str, str]:
    """Check that open_clip has these weights and, offline, that they are here already."""
    architecture, weights = split_name(name)
    known = libraries.open_clip.list_pretrained_tags_by_model(architecture)
    if weights not in known:
        listed = ", ".join(known) or "none"
        raise UnknownModel(f"open_clip has no weights {weights!r} for {architecture!r}: {listed}")
    if offline:
        repository = libraries.open_clip.get_pretrained_cfg(architecture, weights).get("hf_hub", "")
        found = [
            libraries.hub.try_to_load_from_cache(repository.strip("/"), file, cache_dir=str(cache))
            for file in WEIGHT_FILES
            if repository
        ]
        if not any(isinstance(path, str) for path in found):
            raise ModelUnavailable(f"{name} is not in {cache} and ML_OFFLINE forbids to fetch it")
    return architecture, weights


def _bytes_of(module: Any) -> int:
    return sum(weight.numel() * weight.element_size() for weight in module.parameters())


class VisualGraph:
    """The visual tower as a tensor graph, so that the project's own preprocessing feeds it."""

    max_batch = MAX_BATCH
    fixed_shapes = False
    metadata: Mapping[str, str] = MappingProxyType({})

    def __init__(self, towers: Towers, side_px: int) -> None:
        self._towers = towers
        self.inputs = (TensorSpec("image", np.dtype(np.float32), (None, 3, side_px, side_px)),)
        self.outputs = (TensorSpec("embedding", np.dtype(np.float32), (None, None)),)
        self.size_bytes = towers.size_bytes(Part.VISUAL)

    def run(self, feeds: Mapping[str, Tensor]) -> list[Tensor]:
        """Embed (N, 3, S, S) float32 pictures: [(N, D)]."""
        return [self._towers.encode("encode_image", feeds["image"])]

    def close(self) -> None:
        """The engine frees the towers when both halves are closed."""


class TextualModel:
    """Text → unit vector (D,) float32, through open_clip's own tokenizer."""

    max_batch = MAX_BATCH

    def __init__(self, towers: Towers, config: TextConfig, *, name: str, dim: int | None) -> None:
        self._towers = towers
        self._config = config
        self._name = name
        self._dim = dim
        self.size_bytes = towers.size_bytes(Part.TEXTUAL)

    def preprocess(self, item: SearchQuery) -> Tensor:
        """Clean and tokenise a text: (context length,) integers."""
        text = clean_text(item, self._config)
        return np.asarray(self._towers.tokenizer([text])[0])

    def infer(self, batch: Sequence[Tensor]) -> list[Floats]:
        """Embed N token lists."""
        return list(self._towers.encode("encode_text", np.stack(batch)))

    def postprocess(self, raw: Floats, item: SearchQuery) -> Floats:
        """Check the vector."""
        return check_vector(raw, name=self._name, dim=self._dim)

    def close(self) -> None:
        """The engine frees the towers when both halves are closed."""


class Half:
    """One half of a model that is shared: closing both frees the towers."""

    def __init__(self, model: AnyModel, release: Any) -> None:
        self._model = model
        self._release = release
        self.max_batch = model.max_batch
        self.size_bytes = model.size_bytes
        self.preprocess = model.preprocess
        self.infer = model.infer
        self.postprocess = model.postprocess

    def close(self) -> None:
        """Let go of the towers."""
        self._release()


class OpenClipEngine:
    """Serves `open_clip/...` names on the GPU or the CPU; both halves share one set of weights."""

    name = "open_clip"
    needs_files = False

    def __init__(self, settings: Settings, libraries: Libraries) -> None:
        self._settings = settings
        self._libraries = libraries
        self._towers: dict[str, Towers] = {}  # device thread only, as is the next
        self._users: dict[str, set[Part]] = {}
        self.device = Device(self.name)

    def load(self, key: ModelKey, files: ModelFiles | None) -> AnyModel:
        """Give one half; open_clip fetches its weights when they are not here.

        Raises:
            UnknownModel: not an `open_clip/` name, or open_clip has no such weights.
            ModelUnavailable: offline and not fetched before.
            LoadFailed: open_clip rejects its own weights, or they cannot be fetched.
        """
        split_name(key.name)
        if key.name not in self._towers:
            self._towers[key.name] = Towers(self._libraries, key.name, self._settings)
        towers = self._towers[key.name]
        build = self._visual if key.part is Part.VISUAL else self._textual
        model = build(key, towers)
        self._users.setdefault(key.name, set()).add(key.part)
        return Half(model, lambda: self._release(key))

    def _visual(self, key: ModelKey, towers: Towers) -> AnyModel:
        size = towers.preprocess["size"]
        raw = {**towers.preprocess, "size": list(size) if isinstance(size, tuple) else size}
        config = VisualConfig.parse(raw, compat=self._settings.immich_compat)
        graph = VisualGraph(towers, config.side_px)
        return ClipVisualModel(graph, config, name=str(key), dim=towers.config["embed_dim"])

    def _textual(self, key: ModelKey, towers: Towers) -> AnyModel:
        config = TextConfig.parse(towers.config, name=split_name(key.name)[0])
        return TextualModel(towers, config, name=str(key), dim=towers.config["embed_dim"])

    def _release(self, key: ModelKey) -> None:
        self._users[key.name].discard(key.part)
        if not self._users[key.name]:
            self._towers.pop(key.name, None)


def create_open_clip(settings: Settings) -> OpenClipEngine:
    """Make the engine; the extra must be installed."""
    return OpenClipEngine(settings, load_libraries())
