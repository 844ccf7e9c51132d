from pathlib import Path

import pytest
from doubles.hub import onnx_bytes

from immich_ml_metal.catalog import find_by_name
from immich_ml_metal.errors import DownloadFailed
from immich_ml_metal.models.file_lock import hold
from immich_ml_metal.models.prune import Waste, find_waste, folder_of, remove
from immich_ml_metal.models.shelf import Shelf
from immich_ml_metal.types import Part


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    for path in (
        "facial-recognition/buffalo_l/detection/model.onnx",
        "facial-recognition/buffalo_l/detection/model.armnn",
        "facial-recognition/buffalo_l/detection/rknpu/rk3588/model.rknn",
        "facial-recognition/buffalo_l/.incoming/recognition/model.onnx.ab.partial",
        "facial-recognition/buffalo_s/v2/.incoming/detection/model.onnx.cd.partial",
        "facial-recognition/mine/model.onnx",
        "clip/ViT-B-32__openai/visual/model.onnx",
        "notes.txt",
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(onnx_bytes(64))
    return Shelf(tmp_path, "main")


def relative(shelf: Shelf, found: list[Waste]) -> dict[str, str]:
    return {str(w.path.relative_to(shelf.models_dir)): w.reason for w in found}


def test_unfinished_downloads_and_files_for_other_hardware_can_go(shelf: Shelf) -> None:
    assert relative(shelf, find_waste(shelf)) == {
        "facial-recognition/buffalo_l/.incoming": "unfinished download",
        "facial-recognition/buffalo_s/v2/.incoming": "unfinished download",
        "facial-recognition/buffalo_l/detection/model.armnn": "for other hardware",
        "facial-recognition/buffalo_l/detection/rknpu/rk3588/model.rknn": "for other hardware",
    }


def test_models_that_are_not_named_can_go_as_a_whole(shelf: Shelf) -> None:
    found = relative(shelf, find_waste(shelf, frozenset({"ViT-B-32__openai", "buffalo_s"})))
    assert found == {
        "facial-recognition/buffalo_l": "not configured",
        "facial-recognition/buffalo_s/v2/.incoming": "unfinished download",
    }


def test_nothing_but_what_was_listed_is_deleted(shelf: Shelf) -> None:
    for waste in find_waste(shelf):
        remove(shelf, waste)
    left = {str(p.relative_to(shelf.models_dir)) for p in shelf.models_dir.rglob("*.*")}
    assert {
        "facial-recognition/buffalo_l/detection/model.onnx",
        "facial-recognition/mine/model.onnx",
        "clip/ViT-B-32__openai/visual/model.onnx",
        "notes.txt",
    } <= left
    assert find_waste(shelf) == []


def test_what_is_being_downloaded_is_not_deleted(shelf: Shelf) -> None:
    key = find_by_name("buffalo_l").key(Part.RECOGNITION)
    lock = shelf.lock_path(key, key.part)
    with hold(lock), pytest.raises(DownloadFailed, match="being downloaded"):
        remove(shelf, find_waste(shelf)[0])


def test_a_model_is_removed_with_all_its_revisions(shelf: Shelf) -> None:
    waste = folder_of(shelf, find_by_name("buffalo_s"))
    assert waste is not None
    remove(shelf, waste)
    assert folder_of(shelf, find_by_name("buffalo_s")) is None
