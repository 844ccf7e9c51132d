"""Every fault of a network, and what a person sees. The same table is in docs/models.md."""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from doubles.hub import FakeHub, Fault, onnx_bytes, serve_hub

from immich_ml_metal.catalog import model_key
from immich_ml_metal.errors import DownloadFailed, ModelError, ModelUnavailable
from immich_ml_metal.models.manifest import NAME
from immich_ml_metal.models.progress import DownloadProgress
from immich_ml_metal.models.remote import Retry
from immich_ml_metal.models.store import ModelStore
from immich_ml_metal.settings import Settings
from immich_ml_metal.types import Part, Task

KEY = model_key("buffalo_s", Task.FACES, Part.DETECTION)
GOOD = onnx_bytes(30_000, seed=3)
FILE = "detection/model.onnx"
LIST = "/revision/main"
FAST = Retry(attempts=3, first_wait_s=0.001, max_wait_s=0.002)
DOCS = Path(__file__).parents[2] / "docs" / "models.md"


@dataclass(frozen=True)
class Case:
    """One line of the table.

    Attributes:
        name: as in docs/models.md.
        where: the address that fails.
        fault: what happens there.
        note: what is shown while it is tried again; empty when it is not.
        error: the error when it never gets better; None when it ends well all the same.
        kind: its type.
    """

    name: str
    where: str
    fault: Fault
    note: str
    error: str | None
    kind: type[ModelError] = DownloadFailed


CUT = "the line was cut"
CASES = [
    Case("slow", FILE, Fault(chunk_s=0.002), "", None),
    Case("silent", FILE, Fault(stall_s=0.6), "no data for too long", "no data for too long"),
    Case("cut at byte N", FILE, Fault(cut_at=0), CUT, CUT),
    Case("429", FILE, Fault(status=429, retry_after_s=0), "answered 429", "answered 429"),
    Case("500", FILE, Fault(status=500), "answered 500", "answered 500"),
    Case("404", FILE, Fault(status=404), "", "answered 404: no such file", ModelUnavailable),
    Case("403", FILE, Fault(status=403), "", "access denied; set HF_TOKEN", ModelUnavailable),
    Case("web page as 200", FILE, Fault(html=True), "web page", "a web page, not a file"),
    Case("wrong length", FILE, Fault(short_by=5), "wrong length", "wrong length: 30"),
    Case("wrong digest", FILE, Fault(flip=True), "wrong digest", "wrong digest"),
    Case("list: 429", LIST, Fault(status=429, retry_after_s=0), "answered 429", "answered 429"),
    Case("list: 500", LIST, Fault(status=503), "answered 503", "answered 503"),
    Case(
        "list: 404", LIST, Fault(status=404), "", "does not exist, or is private", ModelUnavailable
    ),
    Case("list: web page", LIST, Fault(html=True), "model hub", "does not answer like a model hub"),
    Case("list: cut", LIST, Fault(cut_at=0), CUT, CUT),
    Case("list: silent", LIST, Fault(stall_s=0.6), "no data", "no data for too long"),
]

PASSING = [case for case in CASES if case.kind is not ModelUnavailable]  # final: asked only once


def make_store(hub: FakeHub, folder: Path) -> ModelStore:
    settings = Settings(models_dir=folder, hub_endpoint=hub.url, download_timeout_s=0.3)
    return ModelStore(settings, retry=FAST)


@pytest.mark.parametrize("case", PASSING, ids=lambda case: case.name)
def test_a_passing_fault_is_told_and_overcome(case: Case, hub: FakeHub, tmp_path: Path) -> None:
    hub.fail(case.where, case.fault)
    shown: list[DownloadProgress] = []
    files = make_store(hub, tmp_path).ensure(KEY, shown.append)
    assert files.graph.read_bytes() == GOOD
    notes = {progress.note for progress in shown if progress.note}
    assert len(notes) == (1 if case.note else 0)
    assert all(case.note in note for note in notes)
    assert shown[-1].done_bytes == len(GOOD)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_lasting_fault_ends_in_an_error_that_says_what_happened(
    case: Case, hub: FakeHub, tmp_path: Path
) -> None:
    hub.fail(case.where, forever=case.fault)
    if case.error is None:
        assert make_store(hub, tmp_path).ensure(KEY).graph.is_file()
        return
    with pytest.raises(case.kind, match=re.escape(case.error)):
        make_store(hub, tmp_path).ensure(KEY)
    assert make_store(hub, tmp_path).locate(KEY) is None


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_no_fault_harms_what_is_there(case: Case, hub: FakeHub, tmp_path: Path) -> None:
    other = model_key("buffalo_s", Task.FACES, Part.RECOGNITION)
    store = make_store(hub, tmp_path)
    store.ensure(other)
    before = snapshot(tmp_path)
    hub.fail(case.where, forever=case.fault)
    if case.error is not None:
        with pytest.raises(ModelError):
            store.ensure(KEY)
    assert before.items() <= snapshot(tmp_path).items()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_damaged_file_is_kept_until_its_replacement_is_whole(
    case: Case, hub: FakeHub, tmp_path: Path
) -> None:
    store = make_store(hub, tmp_path)
    graph = store.ensure(KEY).graph
    damaged = GOOD[:-9] + b"?" * 9
    graph.write_bytes(damaged)
    hub.fail(case.where, forever=case.fault)
    if case.error is not None:
        with pytest.raises(ModelError):
            store.repair(KEY)
        assert graph.read_bytes() == damaged
    hub.heal()
    assert store.repair(KEY)
    assert graph.read_bytes() == GOOD


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_documentation_shows_the_same_words(case: Case) -> None:
    rows = [line for line in DOCS.read_text().splitlines() if line.startswith(f"| {case.name} |")]
    assert len(rows) == 1
    words = case.error or "slowly, but whole"
    assert words.removesuffix(": 30") in rows[0]


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file of the shelf with its content and time, locks and staging left out."""
    return {
        str(path): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file() and not {".locks", ".incoming"} & set(path.parts) and path.name != NAME
    }


def test_a_cut_line_goes_on_where_it_stopped(hub: FakeHub, tmp_path: Path) -> None:
    hub.fail(FILE, Fault(cut_at=10_000), Fault(cut_at=5_000))
    assert make_store(hub, tmp_path).ensure(KEY).graph.read_bytes() == GOOD
    assert [seen.range for seen in hub.asked(FILE)] == [None, "bytes=10000-", "bytes=15000-"]


def test_a_line_that_is_cut_often_but_advances_is_not_given_up(
    hub: FakeHub, tmp_path: Path
) -> None:
    hub.fail(FILE, *[Fault(cut_at=2_000)] * 10)  # ten times, with three tries allowed
    assert make_store(hub, tmp_path).ensure(KEY).graph.read_bytes() == GOOD


def test_the_next_start_goes_on_where_the_last_one_gave_up(hub: FakeHub, tmp_path: Path) -> None:
    hub.fail(FILE, Fault(cut_at=12_288), forever=Fault(status=502))
    with pytest.raises(DownloadFailed):
        make_store(hub, tmp_path).ensure(KEY)
    hub.heal()
    shown: list[DownloadProgress] = []
    make_store(hub, tmp_path).ensure(KEY, shown.append)
    assert hub.asked(FILE)[-1].range == "bytes=12288-"
    assert shown[0].done_bytes == 12_288


def test_a_server_that_cannot_resume_sends_the_whole_file(hub: FakeHub, tmp_path: Path) -> None:
    hub.fail(FILE, Fault(cut_at=9_000), Fault(ignore_range=True))
    assert make_store(hub, tmp_path).ensure(KEY).graph.read_bytes() == GOOD


def test_a_server_that_resumes_elsewhere_is_not_believed(hub: FakeHub, tmp_path: Path) -> None:
    hub.fail(FILE, Fault(cut_at=9_000), Fault(misplace=True))
    assert make_store(hub, tmp_path).ensure(KEY).graph.read_bytes() == GOOD
    assert hub.asked(FILE)[-1].range is None


def test_a_new_version_at_the_source_is_not_mixed_with_the_old_one(
    hub: FakeHub, tmp_path: Path
) -> None:
    hub.fail(FILE, Fault(cut_at=12_288), forever=Fault(status=502))
    with pytest.raises(DownloadFailed):
        make_store(hub, tmp_path).ensure(KEY)
    hub.heal()
    hub.add("immich-app/buffalo_s", FILE, onnx_bytes(30_000, seed=77))
    assert make_store(hub, tmp_path).ensure(KEY).graph.read_bytes() == onnx_bytes(30_000, seed=77)


def test_a_server_that_is_gone_is_named(tmp_path: Path) -> None:
    with serve_hub() as hub:
        store = make_store(hub, tmp_path)
    with pytest.raises(DownloadFailed, match=r"buffalo_s/detection: cannot connect"):
        store.ensure(KEY)


def test_a_repository_path_cannot_leave_the_model_folder(hub: FakeHub, tmp_path: Path) -> None:
    hub.add("immich-app/buffalo_s", "detection/../../evil.txt", b"x" * 2000)
    make_store(hub, tmp_path / "m").ensure(KEY)
    assert not list(tmp_path.rglob("evil.txt"))


def test_a_file_with_the_wrong_pinned_digest_is_never_installed(
    hub: FakeHub, tmp_path: Path
) -> None:
    hub.fail(FILE, forever=Fault(flip=True))
    with pytest.raises(DownloadFailed):
        make_store(hub, tmp_path).ensure(KEY)
    assert not list(tmp_path.rglob("model.onnx"))
    assert not list(tmp_path.rglob("*.partial")), "bytes known to be wrong are not kept"


def test_the_token_goes_to_the_hub_but_not_to_where_it_redirects(
    hub: FakeHub, tmp_path: Path
) -> None:
    with serve_hub() as elsewhere:
        path = f"/immich-app/buffalo_s/resolve/0123456789abcdef0123456789abcdef01234567/{FILE}"
        elsewhere.files[path] = GOOD
        cdn = elsewhere.url.replace("127.0.0.1", "localhost")
        hub.fail(FILE, forever=Fault(redirect=cdn))
        make_store(hub, tmp_path).ensure(KEY)
        assert elsewhere.seen[-1].authorization is None
