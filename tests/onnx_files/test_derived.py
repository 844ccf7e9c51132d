"""Derived forms on disk: what decides whether one is used, and what is cleaned up when."""

import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from doubles.hub import external_onnx, onnx_bytes

from immich_ml_metal.onnx_files import derived
from immich_ml_metal.onnx_files.derived import ABANDONED_S, DerivedForm

CONTENT = b"packed weights"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    external_onnx(tmp_path)
    return tmp_path / "model.onnx"


def form_of(model: Path, version: str = "lib1", variant: str = "f16") -> DerivedForm:
    return DerivedForm(model, "kind", version, variant)


def fill(folder: Path) -> None:
    (folder / "weights").write_bytes(CONTENT)


def never(folder: Path) -> None:
    raise AssertionError(f"made again in {folder}")


def names(model: Path) -> list[str]:
    return sorted(path.name for path in (model.parent / "kind").iterdir())


def test_a_form_is_found_after_it_was_made_and_not_before(model: Path) -> None:
    assert form_of(model).find() is None
    made = form_of(model).make(fill)
    assert form_of(model).find() == made
    assert (made / "weights").read_bytes() == CONTENT
    assert names(model) == [made.name]


def test_it_is_readable_by_every_user_like_the_model(model: Path) -> None:
    made = form_of(model).make(fill)
    assert made.stat().st_mode & 0o777 == 0o755
    assert {file.stat().st_mode & 0o777 for file in made.iterdir()} == {0o644}


def test_finding_changes_nothing_on_disk(model: Path) -> None:
    form_of(model).find()
    assert not (model.parent / "kind").exists()


@pytest.mark.parametrize(("version", "variant"), [("lib2", "f16"), ("lib1", "f32")])
def test_another_version_or_variant_is_another_form(
    model: Path, version: str, variant: str
) -> None:
    form_of(model).make(fill)
    assert form_of(model, version, variant).find() is None


def test_a_new_version_replaces_its_own_variant_and_no_other(model: Path) -> None:
    form_of(model).make(fill)
    other = form_of(model, variant="bf16").make(fill)
    new = form_of(model, version="lib2").make(fill)
    assert names(model) == sorted([other.name, new.name])


def test_forms_of_another_file_in_the_same_folder_stay(model: Path) -> None:
    second = model.with_name("model-2.onnx")
    second.write_bytes(onnx_bytes(seed=5))
    kept = form_of(second).make(fill)
    form_of(model).make(fill)
    form_of(model, version="lib2").make(fill)
    assert form_of(second).find() == kept


def replace_graph(model: Path) -> None:
    model.write_bytes(model.read_bytes() + b"\x72\x02hi")


def replace_side_file(model: Path) -> None:
    side = model.with_name("w.bias")
    content = side.read_bytes()[::-1]
    side.write_bytes(content)


@pytest.mark.parametrize("change", [replace_graph, replace_side_file])
def test_new_weights_get_a_new_form_and_the_old_one_goes(
    model: Path, change: Callable[[Path], None]
) -> None:
    old = form_of(model).make(fill)
    change(model)
    assert form_of(model).find() is None
    new = form_of(model).make(fill)
    assert new != old
    assert names(model) == [new.name]


@pytest.mark.parametrize("stray", [".DS_Store", "preprocess_cfg.json", "notes", "._model.onnx"])
def test_what_else_lies_in_the_folder_does_not_matter(model: Path, stray: str) -> None:
    made = form_of(model).make(fill)
    (model.parent / stray).write_bytes(b"\0\0\0\1Bud1")
    assert form_of(model).find() == made


def test_weights_that_were_only_copied_keep_their_form(model: Path, tmp_path: Path) -> None:
    made = form_of(model).make(fill)
    os.utime(model, (1, 1))
    assert form_of(model).find() is None  # it cannot know without reading
    assert form_of(model).make(never) == made
    assert form_of(model).find() == made


def truncate(form: Path) -> None:
    (form / "weights").write_bytes(CONTENT[:-1])


def lose(form: Path) -> None:
    (form / "weights").unlink()


def tear_manifest(form: Path) -> None:
    (form / "manifest.json").write_text('{"files": ')


def empty_manifest(form: Path) -> None:
    (form / "manifest.json").write_text("[]")


def forget_digest(form: Path) -> None:
    manifest = json.loads((form / "manifest.json").read_text())
    del manifest["sha256"]
    (form / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("spoil", [truncate, lose, tear_manifest, empty_manifest, forget_digest])
def test_a_form_that_is_not_whole_is_made_again(model: Path, spoil: Callable[[Path], None]) -> None:
    made = form_of(model).make(fill)
    spoil(made)
    assert form_of(model).find() is None
    assert form_of(model).make(fill) == made
    assert (made / "weights").read_bytes() == CONTENT


def test_a_maker_that_fails_leaves_nothing(model: Path) -> None:
    def fail(folder: Path) -> None:
        fill(folder)
        raise RuntimeError("no space")

    with pytest.raises(RuntimeError):
        form_of(model).make(fail)
    assert names(model) == []


def test_a_full_disk_is_told_before_anything_is_written(model: Path) -> None:
    with pytest.raises(OSError, match="free on"):
        form_of(model).make(never, room_bytes=2**62)


@pytest.mark.parametrize(("age_s", "stays"), [(ABANDONED_S + 60, False), (ABANDONED_S - 60, True)])
def test_what_a_killed_maker_left_goes_and_what_a_running_one_writes_stays(
    model: Path, age_s: float, stays: bool
) -> None:
    left = model.parent / "kind" / ".staging-x"
    left.mkdir(parents=True)
    (left / "weights").write_bytes(CONTENT)
    then = left.stat().st_mtime - age_s
    os.utime(left, (then, then))
    form_of(model).make(fill)
    assert left.exists() == stays


def test_two_makers_at_once_end_with_one_whole_form(model: Path) -> None:
    together = threading.Barrier(2)
    made: list[Path] = []

    def write(folder: Path) -> None:
        fill(folder)
        together.wait(timeout=30)

    def make() -> None:
        made.append(form_of(model).make(write))

    threads = [threading.Thread(target=make) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(made)) == 1
    assert form_of(model).find() == made[0]
    assert names(model) == [made[0].name]


def test_a_bad_form_that_was_discarded_is_made_again(model: Path) -> None:
    made = form_of(model).make(fill)
    form_of(model).discard(made)
    assert form_of(model).find() is None
    assert form_of(model).make(fill) == made


def test_a_read_only_folder_still_gives_the_form_of_weights_that_were_copied(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = form_of(model).make(fill)
    os.utime(model, (1, 1))

    def refuse(folder: Path, manifest: object) -> None:
        raise OSError("read-only file system")

    monkeypatch.setattr(derived, "_write_manifest", refuse)
    assert form_of(model).make(never) == made


def test_side_files_of_one_name_in_two_folders_both_count(tmp_path: Path) -> None:
    import onnx

    external_onnx(tmp_path)
    proto = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    twin = proto.graph.initializer.add()
    twin.CopyFrom(proto.graph.initializer[0])
    twin.name = "twin"
    next(e for e in twin.external_data if e.key == "location").value = "inner/w.bias"
    (tmp_path / "inner").mkdir()
    shutil.copy2(tmp_path / "w.bias", tmp_path / "inner" / "w.bias")
    (tmp_path / "model.onnx").write_bytes(proto.SerializeToString())
    made = form_of(tmp_path / "model.onnx").make(fill)
    os.utime(tmp_path / "inner" / "w.bias", (1, 1))
    assert form_of(tmp_path / "model.onnx").find() is None
    assert made.is_dir()
