import json
from pathlib import Path

import pytest
from doubles.hub import FakeHub, Fault, external_onnx, onnx_bytes

from immich_ml_metal.catalog import model_key
from immich_ml_metal.errors import ModelUnavailable
from immich_ml_metal.models.manifest import NAME, load_manifest, save_manifest
from immich_ml_metal.models.remote import Retry
from immich_ml_metal.models.shelf import FileState
from immich_ml_metal.models.store import ModelStore
from immich_ml_metal.settings import Settings
from immich_ml_metal.types import Part, Task

VISUAL = model_key("ViT-B-32__openai", Task.CLIP, Part.VISUAL)
DETECTOR = model_key("buffalo_s", Task.FACES, Part.DETECTION)


@pytest.fixture
def store(hub: FakeHub, tmp_path: Path) -> ModelStore:
    settings = Settings(models_dir=tmp_path, hub_endpoint=hub.url)
    return ModelStore(settings, retry=Retry(attempts=2, first_wait_s=0.001))


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_what_was_downloaded_is_verified(store: ModelStore) -> None:
    store.ensure(VISUAL)
    status = store.verify(VISUAL)
    assert status.state is FileState.VERIFIED
    assert set(status.files) == {"config.json", "visual/model.onnx", "visual/preprocess_cfg.json"}


def test_verifying_remembers_when(store: ModelStore) -> None:
    root = store.ensure(DETECTOR).root
    first = load_manifest(root).files["detection/model.onnx"].verified_at
    store.verify(DETECTOR)
    assert load_manifest(root).files["detection/model.onnx"].verified_at > first


def test_a_flipped_bit_is_found_and_that_file_alone_is_fetched_again(
    store: ModelStore, hub: FakeHub
) -> None:
    files = store.ensure(VISUAL)
    flip_a_bit(files.folder / "preprocess_cfg.json")
    status = store.verify(VISUAL)
    assert status.state is FileState.DAMAGED
    assert status.files["visual/preprocess_cfg.json"] is FileState.DAMAGED
    assert status.files["visual/model.onnx"] is FileState.VERIFIED
    assert store.repair(VISUAL)
    assert store.verify(VISUAL).state is FileState.VERIFIED
    assert len(hub.asked("visual/model.onnx")) == 1
    assert len(hub.asked("visual/preprocess_cfg.json")) == 2


def test_repairing_what_is_intact_asks_nobody(store: ModelStore, hub: FakeHub) -> None:
    store.ensure(VISUAL)
    before = len(hub.seen)
    assert not store.repair(VISUAL)
    assert len(hub.seen) == before


def test_a_cut_side_file_is_damage(store: ModelStore, hub: FakeHub, tmp_path: Path) -> None:
    for name, content in external_onnx(tmp_path).items():
        hub.add("immich-app/ViT-B-32__openai", f"visual/{name}", content)
    files = store.ensure(VISUAL)
    weights = files.folder / "w.bias"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert store.locate(VISUAL) is None
    store.ensure(VISUAL)
    assert store.verify(VISUAL).state is FileState.VERIFIED


def test_a_downloaded_file_replaced_by_hand_is_used_and_marked(
    store: ModelStore, hub: FakeHub
) -> None:
    files = store.ensure(DETECTOR)
    mine = onnx_bytes(50_000, seed=50)
    files.graph.write_bytes(mine)
    before = len(hub.seen)
    assert store.ensure(DETECTOR) == files
    assert store.status(DETECTOR).state is FileState.UNVERIFIED
    assert not store.repair(DETECTOR)
    assert files.graph.read_bytes() == mine
    assert len(hub.seen) == before


def test_files_placed_by_hand_are_verified_online_when_they_are_the_official_ones(
    store: ModelStore,
) -> None:
    root = store.ensure(VISUAL).root
    (root / NAME).unlink()
    assert store.verify(VISUAL).state is FileState.UNVERIFIED
    assert store.verify(VISUAL, online=True).state is FileState.VERIFIED
    assert store.status(VISUAL).state is FileState.VERIFIED


def test_files_placed_by_hand_stay_unverified_when_they_are_not_official(
    store: ModelStore, tmp_path: Path
) -> None:
    mine = tmp_path / "facial-recognition" / "buffalo_s" / "detection" / "model.onnx"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(onnx_bytes(seed=9))
    assert store.verify(DETECTOR, online=True).state is FileState.UNVERIFIED
    assert not load_manifest(mine.parents[1]).files


def test_damage_found_offline_is_told_and_left_alone(hub: FakeHub, tmp_path: Path) -> None:
    graph = ModelStore(Settings(models_dir=tmp_path, hub_endpoint=hub.url)).ensure(DETECTOR).graph
    flip_a_bit(graph)
    before = graph.read_bytes()
    offline = ModelStore(Settings(models_dir=tmp_path, hub_endpoint=hub.url, offline=True))
    with pytest.raises(ModelUnavailable, match="is damaged and downloads are switched off"):
        offline.repair(DETECTOR)
    assert graph.read_bytes() == before


@pytest.mark.parametrize("content", ["", "{", '{"files": [1]}', '{"files": {"a": {"x": 1}}}', "[]"])
def test_an_unreadable_manifest_makes_files_unverified_and_nothing_worse(
    store: ModelStore, hub: FakeHub, content: str
) -> None:
    root = store.ensure(DETECTOR).root
    (root / NAME).write_text(content)
    before = len(hub.seen)
    store.ensure(DETECTOR)
    assert store.status(DETECTOR).state is FileState.UNVERIFIED
    assert len(hub.seen) == before


def test_a_manifest_survives_being_written_and_read(store: ModelStore, tmp_path: Path) -> None:
    manifest = load_manifest(store.ensure(VISUAL).root)
    save_manifest(tmp_path / "copy", manifest)
    assert load_manifest(tmp_path / "copy") == manifest
    row = json.loads((tmp_path / "copy" / NAME).read_text())["files"]["config.json"]
    assert set(row) >= {"size_bytes", "sha256", "source", "revision", "fetched_at", "verified_at"}


def test_both_halves_keep_their_records_in_one_manifest(store: ModelStore) -> None:
    root = store.ensure(VISUAL).root
    store.ensure(model_key("ViT-B-32__openai", Task.CLIP, Part.TEXTUAL))
    parts = {path.split("/")[0] for path in load_manifest(root).files}
    assert parts == {"config.json", "visual", "textual"}


def test_a_half_with_damage_at_the_source_keeps_its_other_half(
    store: ModelStore, hub: FakeHub
) -> None:
    root = store.ensure(VISUAL).root
    hub.fail("textual/tokenizer.json", forever=Fault(status=404))
    with pytest.raises(ModelUnavailable):
        store.ensure(model_key("ViT-B-32__openai", Task.CLIP, Part.TEXTUAL))
    assert store.verify(VISUAL).state is FileState.VERIFIED
    assert not (root / "textual" / "model.onnx").exists()
