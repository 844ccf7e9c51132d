"""Folders of other users, shares without locks, broken files, proxies: each costs only itself."""

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from doubles.files import no_more_files
from doubles.hub import ANY, FakeHub, Fault, add_faces
from doubles.tiny_models import CLIP, FACES, make_models

from immich_ml_metal.catalog import find_by_name, model_key
from immich_ml_metal.errors import DownloadFailed, ModelUnavailable
from immich_ml_metal.models.file_lock import Held, hold
from immich_ml_metal.models.remote import Retry
from immich_ml_metal.models.shelf import FileState, Shelf, is_for_us
from immich_ml_metal.models.store import ModelStore
from immich_ml_metal.models.transfer import Corrupt, Transient, raise_for_status
from immich_ml_metal.settings import Settings
from immich_ml_metal.types import Part, Task

DETECTOR = model_key("buffalo_s", Task.FACES, Part.DETECTION)
SRC = Path(__file__).parents[2] / "src"


def make_store(hub: FakeHub, folder: Path) -> ModelStore:
    settings = Settings(models_dir=folder, hub_endpoint=hub.url, download_timeout_s=5)
    return ModelStore(settings, retry=Retry(attempts=4, first_wait_s=0.01))


# -- what cannot be read ---------------------------------------------------------------------------


@pytest.fixture
def loop(models: Path, tmp_path: Path) -> Path:
    """A cache whose face models lie behind a link to itself: nobody can read them, root neither."""
    shutil.copytree(models / "clip", tmp_path / "clip")
    (tmp_path / "facial-recognition").symlink_to(tmp_path / "facial-recognition")
    return tmp_path


def test_a_folder_that_cannot_be_read_costs_only_its_models(loop: Path) -> None:
    store = ModelStore(Settings(models_dir=loop))
    assert store.locate(model_key(CLIP, Task.CLIP, Part.TEXTUAL)) is not None
    key = model_key(FACES, Task.FACES, Part.DETECTION)
    assert store.status(key).state is FileState.UNREADABLE
    with pytest.raises(ModelUnavailable, match=f"{loop}/facial-recognition.*symbolic links"):
        store.ensure(key)
    (told,) = store.shelf.unreadable()
    assert told.startswith(f"{loop}/facial-recognition: ")


def test_a_model_is_not_called_missing_when_no_file_can_be_opened(models: Path) -> None:
    store, key = ModelStore(Settings(models_dir=models, offline=True)), DETECTOR
    with pytest.raises(OSError, match="Too many open files"), no_more_files():
        store.ensure(key)
    assert store.ensure(key).graph.is_file()


def test_a_folder_of_another_user_is_told_with_permission_denied(
    models: Path, tmp_path: Path
) -> None:
    shutil.copytree(models / "facial-recognition", tmp_path / "m" / "facial-recognition")
    (tmp_path / "m" / "facial-recognition").chmod(0)
    code = (
        "import sys; from pathlib import Path; from immich_ml_metal.models.shelf import Shelf;"
        "print(Shelf(Path(sys.argv[1]), 'main').unreadable())"
    )
    plain = ("setpriv", "--bounding-set=-dac_override,-dac_read_search")  # root sees every folder
    if os.geteuid() == 0 and shutil.which("setpriv") is None:
        pytest.skip("root reads everything, and there is no setpriv to make it otherwise")
    done = subprocess.run(
        [*(plain if os.geteuid() == 0 else ()), sys.executable, "-c", code, str(tmp_path / "m")],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(SRC), "HOME": "/"},
        check=False,
    )
    (tmp_path / "m" / "facial-recognition").chmod(0o755)
    assert f"{tmp_path}/m/facial-recognition: permission denied" in done.stdout, done.stderr


def test_what_is_nested_without_end_is_damaged_and_nothing_else(
    models: Path, tmp_path: Path
) -> None:
    make_models(tmp_path)
    folder = tmp_path / "clip" / CLIP / "textual"
    (folder / "tokenizer.json").write_text("[" * 100_000 + "]" * 100_000)
    (tmp_path / "clip" / CLIP / ".immich-ml-metal.json").write_text("[" * 100_000)
    spec = find_by_name(CLIP)
    shelf = Shelf(tmp_path, "main")
    states = shelf.status(spec, Part.TEXTUAL).files
    assert states["textual/tokenizer.json"] is FileState.DAMAGED
    assert shelf.status(spec, Part.VISUAL).is_usable


# -- locks -----------------------------------------------------------------------------------------


def test_a_held_lock_is_told_at_once_or_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.lock"
    with hold(path):
        with pytest.raises(Held), hold(path):
            pass
        waits = threading.Event()
        got = threading.Event()

        def other() -> None:
            with hold(path, wait=waits.set):
                got.set()

        thread = threading.Thread(target=other)
        thread.start()
        assert waits.wait(10)
        assert not got.is_set()
    thread.join(10)
    assert got.is_set()


NO_LOCKS = """
import errno, fcntl, sys
def refuse(fd, how):
    raise OSError(getattr(errno, sys.argv[2]), "no locks here")
fcntl.flock = refuse
import logging
logging.basicConfig()
from pathlib import Path
from immich_ml_metal.models.file_lock import hold, patiently
for name in ("a", "b"):
    with hold(Path(sys.argv[1], name), wait=patiently):
        with hold(Path(sys.argv[1], "inner")):
            print("held", name)
"""


@pytest.mark.parametrize("name", ["ENOTSUP", "ENOLCK", "EBADF", "EINVAL", "EACCES", "ENOSYS"])
def test_a_share_without_locks_is_used_without_with_one_warning(tmp_path: Path, name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", NO_LOCKS, str(tmp_path), name],
        capture_output=True,
        text=True,
        timeout=20,
        env={"PYTHONPATH": str(SRC)},
        check=True,
    )
    assert done.stdout.split("\n")[:2] == ["held a", "held b"]
    assert done.stderr.count("no file locks on") == 1


# -- the way to the hub ----------------------------------------------------------------------------


def test_a_proxy_that_compresses_does_no_harm(hub: FakeHub, tmp_path: Path) -> None:
    add_faces(hub)
    hub.fail("detection/model.onnx", forever=Fault(gzip=True))
    assert make_store(hub, tmp_path).ensure(DETECTOR).graph.is_file()


def test_a_proxy_that_compresses_what_is_resumed_makes_it_start_again(
    hub: FakeHub, tmp_path: Path
) -> None:
    add_faces(hub)
    hub.fail("detection/model.onnx", Fault(cut_at=9000), forever=Fault(gzip=True))
    assert make_store(hub, tmp_path).ensure(DETECTOR).graph.is_file()


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault(says_gzip=True), "not encoded as its Content-Encoding says"),
        (Fault(status=407), "the proxy wants a user and a password"),
    ],
)
def test_an_answer_out_of_order_is_a_failed_download(
    hub: FakeHub, tmp_path: Path, fault: Fault, words: str
) -> None:
    add_faces(hub)
    hub.fail("detection/model.onnx", forever=fault)
    with pytest.raises(DownloadFailed, match=words):
        make_store(hub, tmp_path).ensure(DETECTOR)


@pytest.mark.parametrize("where", ["detection/model.onnx", ANY])
def test_a_redirect_loop_is_a_failed_download(hub: FakeHub, tmp_path: Path, where: str) -> None:
    add_faces(hub)
    hub.fail(where, forever=Fault(redirect=hub.url))
    with pytest.raises(DownloadFailed, match="redirects in a loop"):
        make_store(hub, tmp_path).ensure(DETECTOR)


def test_names_that_no_file_can_have_are_passed_over(hub: FakeHub, tmp_path: Path) -> None:
    add_faces(hub)
    hub.add("immich-app/buffalo_s", "detection/a\0b.onnx", b"x")
    assert make_store(hub, tmp_path).ensure(DETECTOR).graph.is_file()
    assert is_for_us("detection/model.onnx", Part.DETECTION)
    assert not is_for_us("detection/model\n.onnx", Part.DETECTION)


def test_a_list_that_is_not_one_is_a_failed_download(hub: FakeHub, tmp_path: Path) -> None:
    hub.files["/api/models/immich-app/buffalo_s/revision/main"] = json.dumps(
        {"id": "x", "siblings": [{"rfilename": 5, "size": "many", "blobId": []}]}
    ).encode()
    with pytest.raises((DownloadFailed, ModelUnavailable)):
        make_store(hub, tmp_path).ensure(DETECTOR)


def test_more_bytes_than_the_server_has_are_thrown_away(hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(Corrupt, match="fewer bytes"):
        raise_for_status(416, {}, "http://hub/x")


def test_a_file_that_became_shorter_at_its_source_is_fetched_from_nothing(
    hub: FakeHub, tmp_path: Path
) -> None:
    add_faces(hub)
    hub.fail("detection/model.onnx", Fault(cut_at=9000), Fault(status=416))
    assert make_store(hub, tmp_path).ensure(DETECTOR).graph.is_file()
    assert [seen.range for seen in hub.asked("detection/model.onnx")][-1] is None


@pytest.mark.parametrize(
    ("said", "wait_s"), [("5", 5), ("120", 120), ("121", 120), ("86400", 120), ("-1", 0)]
)
def test_a_pause_that_the_server_asks_for_is_kept_up_to_two_minutes(
    said: str, wait_s: float
) -> None:
    with pytest.raises(Transient) as caught:
        raise_for_status(429, {"retry-after": said}, "http://hub/x")
    assert caught.value.wait_s == wait_s


def test_a_date_as_retry_after_is_the_usual_pause() -> None:
    with pytest.raises(Transient) as caught:
        raise_for_status(503, {"retry-after": "Wed, 21 Oct 2026 07:28:00 GMT"}, "http://hub/x")
    assert caught.value.wait_s is None


def test_a_403_through_a_proxy_names_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ModelUnavailable, match="HF_TOKEN"):
        raise_for_status(403, {}, "http://hub/x")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    with pytest.raises(Transient, match="HTTP_PROXY"):
        raise_for_status(403, {}, "http://hub/x")
