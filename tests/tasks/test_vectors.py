"""The tasks against numbers made from the formulas of `docs/contract.md`, not from our code."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from immich_ml_metal.tasks import clip, faces, text_boxes, text_lines

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "tests" / "data" / "vectors"
Case = dict[str, Any]


def cases(name: str) -> list[Case]:
    found: list[Case] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("v", ROOT / "scripts" / "make_vectors.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_files_are_what_the_script_makes(script: Any) -> None:
    assert {path.stem for path in FOLDER.iterdir()} == set(script.VECTORS)
    for name, make in script.VECTORS.items():
        assert json.loads(json.dumps(make())) == cases(name), name


@pytest.mark.parametrize("case", cases("search_pictures"), ids=lambda case: str(case["size"]))
def test_a_picture_becomes_the_square_of_the_formulas(case: Case, script: Any) -> None:
    config = clip.VisualConfig.parse(
        {
            "size": case["side"],
            "mean": [0.5] * 3,
            "std": [0.25] * 3,
            "resize_mode": case["resize_mode"],
        },
        compat="3.3",
    )
    image = Image.fromarray(np.array(script.ramp(*case["size"]), dtype=np.uint8))
    square = np.asarray(clip.resize_square(image, config), dtype=int).transpose(2, 0, 1)
    # one level: the library rounds its filter's weights, the formula does not
    assert np.abs(square - np.array(case["planes"])).max() <= 1


@pytest.mark.parametrize("case", cases("search_texts"))
def test_a_search_text_is_cleaned(case: Case) -> None:
    config = clip.TextConfig(77, canonicalize=case["canonicalize"], language_prefix=False)
    assert clip.clean_text(clip.SearchQuery(case["text"]), config) == case["clean"]


@pytest.mark.parametrize("case", cases("face_canvas"))
def test_a_picture_fits_the_face_canvas(case: Case) -> None:
    assert list(faces.fit_canvas(tuple(case["size"]))) == case["fitted"]


@pytest.mark.parametrize("case", cases("face_heads"), ids=lambda case: f"scale {case['scale']:.2f}")
def test_what_the_strides_fire_becomes_faces(case: Case) -> None:
    heads = []
    for width, field in ((1, "score"), (4, "reach"), (10, "points")):
        for stride, rows in zip(faces.STRIDES, faces.HEAD_ROWS, strict=True):
            head = np.zeros((rows, width), dtype=np.float32)
            for hit in case["hits"]:
                if hit["stride"] == stride:
                    head[hit["row"]] = hit[field]
            heads.append(head)
    found = faces.decode_heads(heads, min_score=case["min_score"], scale=case["scale"])
    wanted = case["faces"]
    assert len(wanted) > 2
    assert found.boxes.tolist() == [face["box"] for face in wanted]
    assert found.scores == pytest.approx([face["score"] for face in wanted])
    assert np.allclose(found.landmarks, [face["landmarks"] for face in wanted], atol=1e-2)


@pytest.mark.parametrize("case", cases("face_alignment"))
def test_five_points_give_the_similarity(case: Case) -> None:
    matrix = faces.similarity_transform(np.array(case["points"], dtype=np.float32))
    assert np.allclose(matrix, case["matrix"], atol=1e-3)


@pytest.mark.parametrize("case", cases("text_sizes"))
def test_a_picture_is_looked_at_for_text_in_this_size(case: Case) -> None:
    size = text_boxes.detection_size(tuple(case["size"]), case["max_resolution"])
    assert list(size) == case["looked_at"]


@pytest.mark.parametrize("case", cases("text_order"), ids=lambda case: str(len(case["order"])))
def test_boxes_are_read_in_this_order(case: Case) -> None:
    quads = np.zeros((len(case["corners"]), 4, 2), dtype=np.float32)
    quads[:, 0] = case["corners"]
    assert text_boxes.reading_order(quads).tolist() == case["order"]


@pytest.mark.parametrize("case", cases("text_widths"))
def test_a_line_gets_a_tensor_of_this_width(case: Case) -> None:
    width, height = case["size"]
    assert text_lines.tensor_width(width / height, fixed=False) == case["width"]


@pytest.mark.parametrize("case", cases("text_steps"))
def test_steps_become_text(case: Case) -> None:
    reading = text_lines.decode_ctc(
        np.array(case["classes"], dtype=np.intp),
        np.array(case["confidences"], dtype=np.float32),
        ["", *"abc", " "],
    )
    assert reading.text == case["text"]
    assert reading.score == pytest.approx(case["score"], abs=1e-5)
