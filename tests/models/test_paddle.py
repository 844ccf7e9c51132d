"""Text models of the revision `main`: one file, no size known before, the digest decides."""

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from doubles.hub import FakeHub, Fault, onnx_bytes, serve_hub

from immich_ml_metal.catalog import ModelSpec, PinnedFile, all_models, get_model
from immich_ml_metal.errors import DownloadFailed, ModelUnavailable
from immich_ml_metal.models.download import Download
from immich_ml_metal.models.manifest import load_manifest
from immich_ml_metal.models.paddle import list_pinned
from immich_ml_metal.models.progress import Tracker
from immich_ml_metal.models.remote import Retry
from immich_ml_metal.models.shelf import FileState, Shelf
from immich_ml_metal.settings import Settings
from immich_ml_metal.types import Part, Task

CONTENT = onnx_bytes(50_000, seed=8)
BASE = "/models/RapidAI/RapidOCR/resolve/v3.10.0/onnx"
FILE = "PP-OCRv5/rec/latin.onnx"


@pytest.fixture
def scope() -> Iterator[FakeHub]:
    with serve_hub() as scope:
        scope.files[f"{BASE}/{FILE}"] = CONTENT
        yield scope


def fetch(scope: FakeHub, folder: Path) -> Shelf:
    """Fetch a text model whose pinned file is CONTENT."""
    spec = get_model("LATIN__PP-OCRv5_mobile")
    assert spec is not None
    pin = PinnedFile(FILE, hashlib.sha256(CONTENT).hexdigest(), 48_000)
    spec = replace(spec, pinned={Part.RECOGNITION: pin})
    key = spec.key(Part.RECOGNITION)
    settings = Settings(models_dir=folder, modelscope_endpoint=scope.url, download_timeout_s=0.3)
    shelf = Shelf(folder, "main")
    shelf.lock_path(key, "x").parent.mkdir(parents=True, exist_ok=True)
    retry = Retry(attempts=3, first_wait_s=0.001)
    Download(settings, shelf, spec, key, Tracker(key), retry).run()
    assert shelf.status(spec, key.part, digests=True).state is FileState.VERIFIED
    assert shelf.files(key).graph.read_bytes() == CONTENT
    return shelf


def test_the_file_is_fetched_checked_and_recorded(scope: FakeHub, tmp_path: Path) -> None:
    root = fetch(scope, tmp_path).models_dir / "ocr" / "LATIN__PP-OCRv5_mobile"
    record = load_manifest(root).files["recognition/model.onnx"]
    assert record.source == f"{scope.url}{BASE}"
    assert record.revision == "v3.10.0"
    assert scope.seen[0].authorization is None


@pytest.mark.parametrize(
    "fault",
    [
        Fault(cut_at=20_000),
        Fault(stall_s=0.5),
        Fault(status=429, retry_after_s=0),
        Fault(status=502),
        Fault(html=True),
        Fault(short_by=100),
        Fault(flip=True),
    ],
    ids=str,
)
def test_a_passing_fault_is_overcome(scope: FakeHub, tmp_path: Path, fault: Fault) -> None:
    scope.fail(FILE, fault)
    fetch(scope, tmp_path)
    if fault.cut_at:
        assert scope.seen[-1].range == f"bytes={fault.cut_at}-"


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault(cut_at=0), "the line was cut"),
        (Fault(status=500), "answered 500"),
        (Fault(html=True), "a web page, not a file"),
        (Fault(short_by=100), "wrong digest"),
        (Fault(flip=True), "wrong digest"),
    ],
    ids=str,
)
def test_a_lasting_fault_is_told_and_nothing_is_installed(
    scope: FakeHub, tmp_path: Path, fault: Fault, words: str
) -> None:
    scope.fail(FILE, forever=fault)
    with pytest.raises(DownloadFailed, match=words):
        fetch(scope, tmp_path)
    assert not list(tmp_path.rglob("model.onnx"))


def test_a_file_that_is_gone_is_told(scope: FakeHub, tmp_path: Path) -> None:
    scope.files.clear()
    with pytest.raises(ModelUnavailable, match="answered 404: no such file"):
        fetch(scope, tmp_path)


@pytest.mark.parametrize(
    "spec", [s for s in all_models() if s.task is Task.OCR], ids=lambda spec: spec.name
)
def test_each_text_model_has_its_own_two_files(spec: ModelSpec) -> None:
    urls = [list_pinned(spec, part, "http://scope").files[0].url for part in spec.parts]
    version, size = spec.name.removeprefix("CH__").split("PP-OCR")[1].split("_")
    language = spec.name.partition("__")[0].lower() if "__" in spec.name else "ch"
    detector, recogniser = (url.removeprefix(f"http://scope{BASE}/") for url in urls)
    if version == "v5":
        assert detector == f"PP-OCRv5/det/ch_PP-OCRv5_det_{size}.onnx"
        assert recogniser == f"PP-OCRv5/rec/{language}_PP-OCRv5_rec_{size}.onnx"
    else:
        assert detector == f"PP-OCRv6/det/PP-OCRv6_det_{size}.onnx"
        assert recogniser == f"PP-OCRv6/rec/PP-OCRv6_rec_{size}.onnx"
