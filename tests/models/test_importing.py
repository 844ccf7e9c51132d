import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from doubles.hub import CLIP_FILES, add_clip, external_onnx, onnx_bytes, serve_hub

from immich_ml_metal.catalog import model_key
from immich_ml_metal.errors import DownloadFailed, ModelUnavailable
from immich_ml_metal.models.importing import (
    Imported,
    export_models,
    find_models,
    import_model,
    open_tree,
)
from immich_ml_metal.models.manifest import NAME
from immich_ml_metal.models.shelf import FileState, Shelf
from immich_ml_metal.models.store import ModelStore
from immich_ml_metal.settings import Settings
from immich_ml_metal.types import Part, Task

VISUAL = model_key("ViT-B-32__openai", Task.CLIP, Part.VISUAL)
TEXTUAL = model_key("ViT-B-32__openai", Task.CLIP, Part.TEXTUAL)
DETECTOR = model_key("buffalo_s", Task.FACES, Part.DETECTION)
RECOGNISER = model_key("buffalo_s", Task.FACES, Part.RECOGNITION)


def make_cache(folder: Path, *, revision: str = "") -> Path:
    """A cache folder as the official service leaves it, ARM builds and hub bookkeeping included."""
    root = folder / "clip" / "ViT-B-32__openai" / revision
    for path, make in CLIP_FILES.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(make())
    (root / ".cache" / "huggingface").mkdir(parents=True)
    (root / ".cache" / "huggingface" / "x.lock").touch()
    return folder


def import_all(source: Path, target: Path) -> list[Imported]:
    with open_tree(source) as tree:
        return [import_model(Shelf(target, "main"), half) for half in find_models(tree)]


def zipped(folder: Path) -> Path:
    target = folder.with_suffix(".zip")
    with zipfile.ZipFile(target, "w") as archive:
        for path in folder.rglob("*"):
            archive.write(path, path.relative_to(folder))
    return target


def as_is(folder: Path) -> Path:
    return folder


@pytest.mark.parametrize("pack", [as_is, zipped])
def test_an_immich_cache_is_imported_without_files_for_other_hardware(
    tmp_path: Path, pack: Callable[[Path], Path]
) -> None:
    done = import_all(pack(make_cache(tmp_path / "cache")), tmp_path / "m")
    assert {(half.found.key, half.outcome) for half in done} == {
        (VISUAL, "imported"),
        (TEXTUAL, "imported"),
    }
    store = ModelStore(Settings(models_dir=tmp_path / "m", offline=True))
    assert store.ensure(VISUAL).graph.read_bytes() == CLIP_FILES["visual/model.onnx"]()
    assert store.status(TEXTUAL).state is FileState.UNVERIFIED
    names = {path.name for path in (tmp_path / "m" / "clip").rglob("*") if path.is_file()}
    assert names == {
        "model.onnx",
        "preprocess_cfg.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
        "config.json",
    }


@pytest.mark.parametrize("inside", ["clip", "clip/ViT-B-32__openai"])
def test_any_folder_inside_a_cache_will_do(tmp_path: Path, inside: str) -> None:
    done = import_all(make_cache(tmp_path / "cache") / inside, tmp_path / "m")
    assert [half.outcome for half in done] == ["imported", "imported"]


def test_another_revision_stays_apart(tmp_path: Path) -> None:
    import_all(make_cache(tmp_path / "cache", revision="v2"), tmp_path / "m")
    v2 = ModelStore(Settings(models_dir=tmp_path / "m", offline=True, model_revision="v2"))
    assert v2.locate(VISUAL) is not None
    assert ModelStore(Settings(models_dir=tmp_path / "m", offline=True)).locate(VISUAL) is None


@pytest.mark.parametrize("pack", [as_is, zipped])
@pytest.mark.parametrize(
    ("detector", "recogniser", "name"),
    [
        ("det_10g.onnx", "w600k_r50.onnx", "buffalo_l"),
        ("det_2.5g.onnx", "w600k_r50.onnx", "buffalo_m"),
        ("det_500m.onnx", "w600k_mbf.onnx", "buffalo_s"),
        ("scrfd_10g_bnkps.onnx", "glintr100.onnx", "antelopev2"),
    ],
)
def test_an_insightface_pack_becomes_the_face_model_of_its_detector(
    tmp_path: Path, pack: Callable[[Path], Path], detector: str, recogniser: str, name: str
) -> None:
    folder = tmp_path / "any name" / "inner"
    folder.mkdir(parents=True)
    (folder / detector).write_bytes(onnx_bytes(seed=1))
    (folder / recogniser).write_bytes(onnx_bytes(seed=2))
    (folder / "genderage.onnx").write_bytes(onnx_bytes(seed=3))
    done = import_all(pack(folder.parent), tmp_path / "m")
    assert [half.outcome for half in done] == ["imported", "imported"]
    root = tmp_path / "m" / "facial-recognition" / name
    assert (root / "detection" / "model.onnx").read_bytes() == onnx_bytes(seed=1)
    assert (root / "recognition" / "model.onnx").read_bytes() == onnx_bytes(seed=2)


def test_a_usable_half_is_not_replaced(tmp_path: Path) -> None:
    mine = tmp_path / "m" / "clip" / "ViT-B-32__openai" / "visual" / "model.onnx"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(onnx_bytes(seed=42))
    (mine.parent / "preprocess_cfg.json").write_text("{}")
    done = import_all(make_cache(tmp_path / "cache"), tmp_path / "m")
    assert {half.found.key: half.outcome for half in done} == {
        VISUAL: "present",
        TEXTUAL: "imported",
    }
    assert mine.read_bytes() == onnx_bytes(seed=42)


@pytest.mark.parametrize(
    ("path", "content", "reason"),
    [
        ("visual/model.onnx", onnx_bytes()[:-9], "visual/model.onnx is damaged"),
        ("visual/preprocess_cfg.json", b"{", "visual/preprocess_cfg.json is damaged"),
        ("visual/preprocess_cfg.json", None, "visual/preprocess_cfg.json is missing"),
    ],
)
def test_a_half_that_is_torn_or_incomplete_is_refused_with_its_reason(
    tmp_path: Path, path: str, content: bytes | None, reason: str
) -> None:
    target = make_cache(tmp_path / "cache") / "clip" / "ViT-B-32__openai" / path
    target.write_bytes(content) if content is not None else target.unlink()
    outcomes = {half.found.key: half for half in import_all(tmp_path / "cache", tmp_path / "m")}
    assert outcomes[VISUAL].outcome == "refused"
    assert reason in outcomes[VISUAL].reason
    assert outcomes[TEXTUAL].outcome == "imported"
    assert not list((tmp_path / "m").rglob("visual/model.onnx"))


def test_side_files_come_along(tmp_path: Path) -> None:
    folder = make_cache(tmp_path / "cache") / "clip" / "ViT-B-32__openai" / "visual"
    for name, content in external_onnx(tmp_path).items():
        (folder / name).write_bytes(content)
    import_all(tmp_path / "cache", tmp_path / "m")
    assert (tmp_path / "m/clip/ViT-B-32__openai/visual/w.bias").exists()


@pytest.mark.parametrize("name", ["stick", "stick.zip"])
def test_what_is_exported_is_imported_as_verified(tmp_path: Path, name: str) -> None:
    with serve_hub() as hub:
        add_clip(hub)
        store = ModelStore(Settings(models_dir=tmp_path / "a", hub_endpoint=hub.url))
        store.ensure(VISUAL)
        store.ensure(TEXTUAL)
    written = export_models(store.shelf, ["ViT-B-32__openai"], tmp_path / name)
    assert Path("clip/ViT-B-32__openai", NAME) in written
    import_all(tmp_path / name, tmp_path / "b")
    copy = ModelStore(Settings(models_dir=tmp_path / "b", offline=True))
    for key in (VISUAL, TEXTUAL):
        assert copy.status(key, digests=True).state is FileState.VERIFIED


def test_a_record_that_does_not_fit_its_file_is_refused(tmp_path: Path) -> None:
    with serve_hub() as hub:
        add_clip(hub)
        store = ModelStore(Settings(models_dir=tmp_path / "a", hub_endpoint=hub.url))
        root = store.ensure(VISUAL).root
    data = json.loads((root / NAME).read_text())
    data["files"]["visual/model.onnx"]["sha256"] = "0" * 64
    (root / NAME).write_text(json.dumps(data))
    (half,) = import_all(tmp_path / "a", tmp_path / "b")
    assert half.outcome == "refused"


def test_a_model_that_is_not_here_cannot_be_exported(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match="models pull buffalo_s"):
        export_models(Shelf(tmp_path, "main"), ["buffalo_s"], tmp_path / "out")


def test_something_that_is_no_folder_and_no_zip_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.zip").write_text("not a zip")
    with pytest.raises(ModelUnavailable, match="neither a folder nor a ZIP"):
        import_all(tmp_path / "x.zip", tmp_path / "m")


def test_a_target_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "m").write_text("a file")
    with pytest.raises(DownloadFailed, match=f"cannot write {tmp_path}/m"):
        import_all(make_cache(tmp_path / "cache"), tmp_path / "m")


@pytest.mark.shared
@pytest.mark.soak
def test_the_cache_of_make_cache_is_imported(shared: Path, tmp_path: Path) -> None:
    import subprocess
    import sys

    made = tmp_path / "cache"
    script = shared / "models" / "make_cache.py"
    subprocess.run([sys.executable, str(script), str(made)], check=True, capture_output=True)
    done = import_all(made, tmp_path / "m")
    assert len(done) == 6
    assert {half.outcome for half in done} == {"imported"}
    store = ModelStore(Settings(models_dir=tmp_path / "m", offline=True))
    for half in done:
        files = store.ensure(half.found.key)
        origin = made / files.graph.relative_to(tmp_path / "m")
        assert files.graph.stat().st_size == origin.stat().st_size
