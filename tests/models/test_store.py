import threading
from pathlib import Path
from typing import Any

import pytest
from doubles.hub import FakeHub, Fault, add_clip, add_faces, external_onnx, onnx_bytes

from immich_ml_metal.catalog import model_key
from immich_ml_metal.errors import DownloadFailed, ModelUnavailable, UnknownModel
from immich_ml_metal.metrics import Metrics
from immich_ml_metal.models.manifest import (
    NAME,
    Manifest,
    load_manifest,
    save_manifest,
    sha256_of,
)
from immich_ml_metal.models.progress import DownloadProgress, Phase
from immich_ml_metal.models.remote import Retry
from immich_ml_metal.models.store import ModelStore
from immich_ml_metal.settings import Settings
from immich_ml_metal.types import ModelKey, Part, Task

VISUAL = model_key("ViT-B-32__openai", Task.CLIP, Part.VISUAL)
TEXTUAL = model_key("ViT-B-32__openai", Task.CLIP, Part.TEXTUAL)
DETECTOR = model_key("buffalo_s", Task.FACES, Part.DETECTION)
FAST = Retry(attempts=3, first_wait_s=0.001, max_wait_s=0.002)


def make_store(hub: FakeHub, folder: Path, **values: Any) -> ModelStore:
    settings = Settings(
        models_dir=folder, hub_endpoint=hub.url, modelscope_endpoint=hub.url, **values
    )
    return ModelStore(settings, retry=FAST)


def test_only_the_half_that_is_needed_is_fetched(hub: FakeHub, tmp_path: Path) -> None:
    add_clip(hub)
    files = make_store(hub, tmp_path).ensure(VISUAL)
    root = tmp_path / "clip" / "ViT-B-32__openai"
    assert (files.graph, files.folder, files.root) == (
        root / "visual" / "model.onnx",
        root / "visual",
        root,
    )
    found = {str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()}
    assert found == {
        "config.json",
        "visual/model.onnx",
        "visual/preprocess_cfg.json",
        ".immich-ml-metal.json",
    }
    assert files.graph.read_bytes() == onnx_bytes(60_000, seed=1)


def test_a_model_on_disk_is_found_without_any_request(hub: FakeHub, tmp_path: Path) -> None:
    add_clip(hub)
    make_store(hub, tmp_path).ensure(TEXTUAL)
    before = len(hub.seen)
    store = make_store(hub, tmp_path)
    assert store.locate(TEXTUAL) == store.ensure(TEXTUAL)
    assert len(hub.seen) == before


def test_another_revision_has_its_own_folder(hub: FakeHub, tmp_path: Path) -> None:
    add_faces(hub)
    files = make_store(hub, tmp_path, model_revision="v2").ensure(DETECTOR)
    assert files.root == tmp_path / "facial-recognition" / "buffalo_s" / "v2"
    assert make_store(hub, tmp_path).locate(DETECTOR) is None


def test_external_data_files_belong_to_their_model(hub: FakeHub, tmp_path: Path) -> None:
    add_clip(hub)
    for name, content in external_onnx(tmp_path).items():
        hub.add("immich-app/ViT-B-32__openai", f"visual/{name}", content)
    files = make_store(hub, tmp_path / "m").ensure(VISUAL)
    assert (files.folder / "w.bias").stat().st_size >= 40_000
    (files.folder / "w.bias").unlink()
    assert make_store(hub, tmp_path / "m").locate(VISUAL) is None
    make_store(hub, tmp_path / "m").ensure(VISUAL)
    assert (files.folder / "w.bias").exists()
    assert len(hub.asked("visual/model.onnx")) == 1, "only the missing file is fetched again"


def test_the_manifest_tells_where_each_file_came_from(hub: FakeHub, tmp_path: Path) -> None:
    add_faces(hub)
    files = make_store(hub, tmp_path).ensure(DETECTOR)
    (path, record), *rest = load_manifest(files.root).files.items()
    assert not rest
    assert path == "detection/model.onnx"
    assert record.sha256 == sha256_of(files.graph)
    assert record.source == f"{hub.url}/immich-app/buffalo_s"
    assert len(record.revision) == 40


def test_offline_uses_what_is_there_and_says_what_is_missing(hub: FakeHub, tmp_path: Path) -> None:
    add_clip(hub)
    make_store(hub, tmp_path).ensure(VISUAL)
    store = make_store(hub, tmp_path, offline=True)
    before = len(hub.seen)
    assert store.ensure(VISUAL).graph.is_file()
    with pytest.raises(ModelUnavailable) as caught:
        store.ensure(TEXTUAL)
    assert len(hub.seen) == before
    assert "models pull ViT-B-32__openai" in str(caught.value)
    assert str(tmp_path / "clip/ViT-B-32__openai/textual/model.onnx") in str(caught.value)


def test_an_unknown_name_never_reaches_the_network(hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(UnknownModel):
        make_store(hub, tmp_path).ensure(ModelKey(Task.CLIP, Part.VISUAL, "ViT-B-32"))
    assert not hub.seen


def test_a_file_placed_by_hand_is_used_and_not_touched(hub: FakeHub, tmp_path: Path) -> None:
    mine = tmp_path / "facial-recognition" / "buffalo_s" / "detection" / "model.onnx"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(onnx_bytes(seed=99))
    before = mine.stat()
    assert make_store(hub, tmp_path).ensure(DETECTOR).graph == mine
    assert not hub.seen
    assert mine.stat().st_mtime_ns == before.st_mtime_ns
    assert not load_manifest(mine.parent.parent).files


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", onnx_bytes()[:-7]])
def test_a_torn_file_is_fetched_anew(hub: FakeHub, tmp_path: Path, content: bytes) -> None:
    add_faces(hub)
    torn = tmp_path / "facial-recognition" / "buffalo_s" / "detection" / "model.onnx"
    torn.parent.mkdir(parents=True)
    torn.write_bytes(content)
    assert make_store(hub, tmp_path).locate(DETECTOR) is None
    make_store(hub, tmp_path).ensure(DETECTOR)
    assert torn.read_bytes() == onnx_bytes(30_000, seed=3)


def test_many_threads_that_need_one_model_download_it_once(hub: FakeHub, tmp_path: Path) -> None:
    add_faces(hub)
    hub.fail("detection/model.onnx", Fault(chunk_s=0.01))
    store = make_store(hub, tmp_path)
    threads = [threading.Thread(target=store.ensure, args=(DETECTOR,)) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(hub.asked("detection/model.onnx")) == 1
    assert len(hub.asked("/revision/main")) == 1, "who waited finds it here and asks nobody"


def test_the_graph_appears_last_because_the_official_service_takes_it_for_the_whole(
    hub: FakeHub, tmp_path: Path
) -> None:
    add_clip(hub)
    in_the_way = tmp_path / "clip/ViT-B-32__openai/visual/preprocess_cfg.json/folder"
    in_the_way.mkdir(parents=True)
    with pytest.raises(DownloadFailed):
        make_store(hub, tmp_path).ensure(VISUAL)
    assert not (tmp_path / "clip/ViT-B-32__openai/visual/model.onnx").exists()


def test_a_slow_download_does_not_hold_up_another_model(hub: FakeHub, tmp_path: Path) -> None:
    add_clip(hub)
    add_faces(hub)
    hub.fail("visual/model.onnx", Fault(stall_s=5.0))
    store = make_store(hub, tmp_path)
    slow = threading.Thread(target=store.ensure, args=(VISUAL,))
    slow.start()
    while not hub.asked("visual/model.onnx"):
        pass
    store.ensure(DETECTOR)
    store.ensure(TEXTUAL)
    assert slow.is_alive()
    slow.join()


def test_progress_is_shown_while_it_runs_and_gone_afterwards(hub: FakeHub, tmp_path: Path) -> None:
    add_clip(hub)
    store = make_store(hub, tmp_path)
    shown: list[DownloadProgress] = []

    def listen(progress: DownloadProgress) -> None:
        shown.append(progress)
        assert [now.key for now in store.downloads()] == [VISUAL]

    store.ensure(VISUAL, listen)
    total = sum(
        len(content)
        for path, content in hub.repositories["immich-app/ViT-B-32__openai"].items()
        if path in ("config.json", "visual/model.onnx", "visual/preprocess_cfg.json")
    )
    assert shown[-1].done_bytes == shown[-1].total_bytes == total
    assert {p.phase for p in shown} == {Phase.DOWNLOADING}
    assert store.downloads() == ()


def test_every_download_is_counted_once_at_its_end(hub: FakeHub, tmp_path: Path) -> None:
    add_clip(hub)
    metrics = Metrics()
    store = ModelStore(
        Settings(models_dir=tmp_path, hub_endpoint=hub.url),
        retry=FAST,
        on_download=metrics.count_download,
    )
    hub.fail("textual/model.onnx", forever=Fault(status=404))
    with pytest.raises((ModelUnavailable, DownloadFailed)):
        store.ensure(TEXTUAL)
    received_bytes = counted(metrics, "immich_ml_download_bytes_total")
    store.ensure(VISUAL)
    store.ensure(VISUAL)
    assert counted(metrics, "immich_ml_downloads_total", outcome="failed") == 1
    assert counted(metrics, "immich_ml_downloads_total", outcome="ok") == 1
    graph = tmp_path / "clip" / "ViT-B-32__openai" / "visual" / "model.onnx"
    received_bytes = counted(metrics, "immich_ml_download_bytes_total") - received_bytes
    assert graph.stat().st_size <= received_bytes < graph.stat().st_size + 10_000


def counted(metrics: Metrics, name: str, **labels: str) -> float:
    return metrics.registry.get_sample_value(name, labels) or 0.0


def test_a_closed_store_ends_its_downloads(hub: FakeHub, tmp_path: Path) -> None:
    add_faces(hub)
    hub.fail("detection/model.onnx", Fault(chunk_s=0.01))
    store = make_store(hub, tmp_path)
    with pytest.raises(DownloadFailed, match="stopped"):
        store.ensure(DETECTOR, lambda progress: store.close())
    assert make_store(hub, tmp_path).ensure(DETECTOR).graph.is_file()


def test_text_models_of_revision_main_come_from_modelscope_with_their_pinned_digest(
    hub: FakeHub, tmp_path: Path
) -> None:
    key = model_key("PP-OCRv5_mobile", Task.OCR, Part.DETECTION)
    hub.files[
        "/models/RapidAI/RapidOCR/resolve/v3.10.0/onnx/PP-OCRv5/det/ch_PP-OCRv5_det_mobile.onnx"
    ] = onnx_bytes()
    with pytest.raises(DownloadFailed, match="wrong digest"):
        make_store(hub, tmp_path).ensure(key)
    assert make_store(hub, tmp_path).locate(key) is None


def test_text_models_of_other_revisions_come_from_the_hub(hub: FakeHub, tmp_path: Path) -> None:
    hub.add("immich-app/PP-OCRv5_mobile", "recognition/model.onnx", onnx_bytes())
    hub.add("immich-app/PP-OCRv5_mobile", "recognition/charset.txt", b"a\nb\n")
    key = model_key("PP-OCRv5_mobile", Task.OCR, Part.RECOGNITION)
    files = make_store(hub, tmp_path, model_revision="v2").ensure(key)
    assert (files.folder / "charset.txt").read_bytes() == b"a\nb\n"


def test_the_detector_that_older_servers_shared_is_found(hub: FakeHub, tmp_path: Path) -> None:
    shared = tmp_path / "ocr" / "PP-OCRv5_mobile" / "detection" / "model.onnx"
    shared.parent.mkdir(parents=True)
    shared.write_bytes(onnx_bytes())
    key = model_key("EN__PP-OCRv5_mobile", Task.OCR, Part.DETECTION)
    files = make_store(hub, tmp_path).locate(key)
    assert files is not None
    assert files.graph == shared


def test_a_folder_that_cannot_be_written_is_named(hub: FakeHub, tmp_path: Path) -> None:
    add_faces(hub)
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(DownloadFailed, match=f"cannot write {tmp_path}/file"):
        make_store(hub, tmp_path / "file").ensure(DETECTOR)


def test_a_manifest_of_a_newer_release_is_left_alone_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = '{"version": 99, "files": {"model.onnx": {"a": 1}}}'
    (tmp_path / NAME).write_text(text)
    assert not load_manifest(tmp_path).files
    save_manifest(tmp_path, Manifest())
    assert (tmp_path / NAME).read_text() == text
    assert "written by a newer release (version 99, this one reads 1)" in caplog.text
