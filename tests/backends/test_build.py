import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from doubles.tiny_models import CLIP, FACES, OCR, make_tokenizer

from immich_ml_metal.backends.build import build_model
from immich_ml_metal.catalog import model_key
from immich_ml_metal.errors import LoadFailed
from immich_ml_metal.settings import Settings
from immich_ml_metal.tasks.clip import ClipTextualModel, ClipVisualModel, SearchQuery
from immich_ml_metal.tasks.faces import FaceDetector, FaceRecogniser
from immich_ml_metal.tasks.text_boxes import TextDetector
from immich_ml_metal.tasks.text_lines import TextRecogniser
from immich_ml_metal.types import ModelFiles, Part, Task, Tensor, TensorSpec


class StubGraph:
    """A graph that is described but computes nothing."""

    max_batch, fixed_shapes, size_bytes = 3, False, 99

    def __init__(self, *, outputs: int = 1, metadata: Mapping[str, str] | None = None) -> None:
        self.inputs = (TensorSpec("text", np.dtype(np.float32), (None, 3, 8, 8)),)
        self.outputs = tuple(
            TensorSpec(f"o{row}", np.dtype(np.float32), (None,)) for row in range(outputs)
        )
        self.metadata = metadata or {}

    def run(self, feeds: Mapping[str, Tensor]) -> list[Tensor]:
        return []

    def close(self) -> None:
        return None


def build(folder: Path, name: str, task: Task, part: Part, **kw: Any) -> Any:
    files = ModelFiles(folder / part / "model.onnx", folder / part, folder)
    settings = kw.pop("settings", Settings())
    return build_model(model_key(name, task, part), files, StubGraph(**kw), settings)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "visual").mkdir()
    write(tmp_path / "visual/preprocess_cfg.json", size=8, mean=[0, 0, 0], std=[1, 1, 1])
    make_tokenizer(tmp_path / "textual")
    write(tmp_path / "config.json", text_cfg={"context_length": 5})
    (tmp_path / "recognition").mkdir()
    (tmp_path / "recognition/charset.txt").write_text("x\ny")
    return tmp_path


def write(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("name", "task", "part", "outputs", "kind"),
    [
        (CLIP, Task.CLIP, Part.VISUAL, 1, ClipVisualModel),
        (CLIP, Task.CLIP, Part.TEXTUAL, 1, ClipTextualModel),
        (FACES, Task.FACES, Part.DETECTION, 9, FaceDetector),
        (FACES, Task.FACES, Part.RECOGNITION, 1, FaceRecogniser),
        (OCR, Task.OCR, Part.DETECTION, 1, TextDetector),
        (OCR, Task.OCR, Part.RECOGNITION, 1, TextRecogniser),
    ],
)
def test_every_half_becomes_the_model_of_its_task(
    folder: Path, name: str, task: Task, part: Part, outputs: int, kind: Any
) -> None:
    model = build(folder, name, task, part, outputs=outputs)
    assert type(model) is kind
    assert model.size_bytes == 99
    model.close()


def test_the_texts_length_and_padding_come_from_the_models_files(folder: Path) -> None:
    model = build(folder, CLIP, Task.CLIP, Part.TEXTUAL)
    (tokens,) = model.preprocess(SearchQuery("a photo of nonsense")).values()
    assert tokens.tolist() == [2, 3, 4, 1, 0]


@pytest.mark.parametrize(
    ("file", "content", "part", "words"),
    [
        ("visual/preprocess_cfg.json", None, Part.VISUAL, "cannot read"),
        ("visual/preprocess_cfg.json", b"{", Part.VISUAL, "not JSON"),
        ("visual/preprocess_cfg.json", b"[1]", Part.VISUAL, "no JSON object"),
        ("visual/preprocess_cfg.json", b"\xff\xfe", Part.VISUAL, "cannot read"),
        ("config.json", None, Part.TEXTUAL, "cannot read"),
        ("textual/tokenizer.json", b"{}", Part.TEXTUAL, "not a tokenizer"),
        ("textual/tokenizer.json", None, Part.TEXTUAL, "cannot read"),
        ("textual/tokenizer_config.json", b"{}", Part.TEXTUAL, "pad_token"),
    ],
)
def test_a_missing_or_broken_side_file_is_told_by_name(
    folder: Path, file: str, content: bytes | None, part: Part, words: str
) -> None:
    (folder / file).unlink() if content is None else (folder / file).write_bytes(content)
    with pytest.raises(LoadFailed, match=words) as caught:
        build(folder, CLIP, Task.CLIP, part)
    assert Path(file).name in str(caught.value)


def test_a_multilingual_text_tower_needs_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    name = "XLM-Roberta-Large-Vit-B-32"
    model = build(folder, name, Task.CLIP, Part.TEXTUAL)
    (tokens,) = model.preprocess(SearchQuery("a")).values()
    assert len(tokens) == 77


def test_the_characters_come_from_the_graph_or_from_the_file_beside_it(folder: Path) -> None:
    inside = build(folder, OCR, Task.OCR, Part.RECOGNITION, metadata={"character": "p\nq\nr"})
    beside = build(folder, OCR, Task.OCR, Part.RECOGNITION)
    assert inside._charset == ("", "p", "q", "r", " ")
    assert beside._charset == ("", "x", "y", " ")
    (folder / "recognition/charset.txt").unlink()
    with pytest.raises(LoadFailed, match=r"charset\.txt"):
        build(folder, OCR, Task.OCR, Part.RECOGNITION)


def test_a_face_detector_without_nine_heads_is_refused(folder: Path) -> None:
    with pytest.raises(LoadFailed, match="3 outputs, an SCRFD detector has 9"):
        build(folder, FACES, Task.FACES, Part.DETECTION, outputs=3)


def test_the_older_resize_rule_is_a_setting(folder: Path) -> None:
    write(
        folder / "visual/preprocess_cfg.json",
        size=8,
        mean=[0, 0, 0],
        std=[1, 1, 1],
        resize_mode="squash",
    )
    modes = [
        build(
            folder, CLIP, Task.CLIP, Part.VISUAL, settings=Settings(immich_compat=version)
        )._config.resize_mode
        for version in ("3.3", "3.2")
    ]
    assert modes == ["squash", "shortest"]
