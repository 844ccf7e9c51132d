"""From a graph and its side files to a model: what all engines that run ONNX files share."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from immich_ml_metal.backends.base import AnyModel
from immich_ml_metal.catalog import Family, find_model
from immich_ml_metal.errors import LoadFailed
from immich_ml_metal.settings import Settings
from immich_ml_metal.tasks.clip import (
    ClipTextualModel,
    ClipVisualModel,
    TextConfig,
    VisualConfig,
    prepare_tokenizer,
)
from immich_ml_metal.tasks.faces import FaceDetector, FaceRecogniser
from immich_ml_metal.tasks.text_boxes import TextDetector
from immich_ml_metal.tasks.text_lines import TextRecogniser
from immich_ml_metal.types import Graph, ModelFiles, ModelKey, Part, Slot, Task


def build_model(key: ModelKey, files: ModelFiles, graph: Graph, settings: Settings) -> AnyModel:
    """Bind `graph` to its task.

    Raises:
        LoadFailed: a side file is missing or malformed, or the graph is not of the task's kind.
    """
    build = BUILDERS[key.task, key.part]
    return build(key, files, graph, settings)


def _clip_visual(key: ModelKey, files: ModelFiles, graph: Graph, settings: Settings) -> AnyModel:
    config = VisualConfig.parse(
        _read_json(files.folder / "preprocess_cfg.json"),
        compat=files.compat or settings.immich_compat,
    )
    return ClipVisualModel(graph, config, name=str(key), dim=_dim(key))


def _clip_textual(key: ModelKey, files: ModelFiles, graph: Graph, settings: Settings) -> AnyModel:
    config = TextConfig.parse(_read_text_config(key, files.root / "config.json"), name=key.name)
    tokenizer = prepare_tokenizer(
        _read_tokenizer(files.folder / "tokenizer.json"),
        _read_json(files.folder / "tokenizer_config.json"),
        config,
    )
    return ClipTextualModel(graph, config, tokenizer, name=str(key), dim=_dim(key))


def _face_detection(key: ModelKey, files: ModelFiles, graph: Graph, settings: Settings) -> AnyModel:
    return FaceDetector(graph, name=str(key))


def _face_recognition(
    key: ModelKey, files: ModelFiles, graph: Graph, settings: Settings
) -> AnyModel:
    return FaceRecogniser(graph, name=str(key), dim=_dim(key))


def _text_detection(key: ModelKey, files: ModelFiles, graph: Graph, settings: Settings) -> AnyModel:
    return TextDetector(graph, name=str(key))


def _text_recognition(
    key: ModelKey, files: ModelFiles, graph: Graph, settings: Settings
) -> AnyModel:
    text = graph.metadata.get("character")
    if text is None:
        text = _read_text(files.folder / "charset.txt")
    return TextRecogniser(graph, text.splitlines(), name=str(key))


_Builder = Callable[[ModelKey, ModelFiles, Graph, Settings], AnyModel]
BUILDERS: dict[Slot, _Builder] = {
    (Task.CLIP, Part.VISUAL): _clip_visual,
    (Task.CLIP, Part.TEXTUAL): _clip_textual,
    (Task.FACES, Part.DETECTION): _face_detection,
    (Task.FACES, Part.RECOGNITION): _face_recognition,
    (Task.OCR, Part.DETECTION): _text_detection,
    (Task.OCR, Part.RECOGNITION): _text_recognition,
}


def _dim(key: ModelKey) -> int | None:
    return find_model(key.name, key.task, key.part).dim


def _read_text_config(key: ModelKey, path: Path) -> dict[str, Any]:
    """The towers' `config.json`; M-CLIP exports may have none, and mean the defaults."""
    family = find_model(key.name, key.task, key.part).family
    return {} if family is Family.MCLIP and not path.exists() else _read_json(path)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise LoadFailed(f"cannot read {path}: {exc}") from exc


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_read_text(path))
    except json.JSONDecodeError as exc:
        raise LoadFailed(f"{path} is not JSON: {exc}") from exc
    if not isinstance(value, dict):
        raise LoadFailed(f"{path} holds no JSON object")
    return value


def _read_tokenizer(path: Path) -> Tokenizer:
    text = _read_text(path)
    try:
        return Tokenizer.from_str(text)
    except Exception as exc:  # tokenizers raises bare Exception from Rust
        raise LoadFailed(f"{path} is not a tokenizer: {exc}") from exc
