"""Two services on one folder, a process killed at any moment, and a full disk."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from doubles.hub import FakeHub, Fault, onnx_bytes

from immich_ml_metal.catalog import model_key
from immich_ml_metal.models.manifest import load_manifest
from immich_ml_metal.models.remote import RemoteFile, Retry
from immich_ml_metal.models.shelf import FileState
from immich_ml_metal.models.store import ModelStore
from immich_ml_metal.models.transfer import partial_path
from immich_ml_metal.settings import Settings
from immich_ml_metal.types import Part, Task

KEY = model_key("ViT-B-32__openai", Task.CLIP, Part.VISUAL)
DETECTOR = model_key("buffalo_s", Task.FACES, Part.DETECTION)
GRAPH = "visual/model.onnx"
SRC = Path(__file__).parents[2] / "src"

# Imports once, then forks a child per line of input that fetches the model; says pid and end.
NURSERY = """
import os, sys
from pathlib import Path
from immich_ml_metal.catalog import model_key
from immich_ml_metal.settings import Settings
from immich_ml_metal.models.store import ModelStore
from immich_ml_metal.types import Part, Task

settings = Settings(models_dir=Path(sys.argv[1]), hub_endpoint=sys.argv[2])
key = model_key("ViT-B-32__openai", Task.CLIP, Part.VISUAL)
print("ready", flush=True)
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            ModelStore(settings).ensure(key)
            code = 0
        finally:
            os._exit(code)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Nursery:
    """Starts fetching processes that can be killed."""

    def __init__(self, folder: Path, hub: FakeHub) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", NURSERY, str(folder), hub.url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(SRC)},
        )
        assert self._read() == "ready"

    def start(self) -> int:
        """Start a fetch; its pid."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return int(self._read())

    def wait(self) -> int:
        """The exit code of the fetch that was started."""
        return int(self._read())

    def close(self) -> None:
        self._process.communicate(timeout=30)

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


def make_store(hub: FakeHub, folder: Path) -> ModelStore:
    settings = Settings(models_dir=folder, hub_endpoint=hub.url)
    return ModelStore(settings, retry=Retry(attempts=2, first_wait_s=0.001))


def test_two_services_that_start_at_once_download_each_file_once(
    hub: FakeHub, tmp_path: Path
) -> None:
    hub.fail(GRAPH, Fault(chunk_s=0.02))
    services = [Nursery(tmp_path, hub) for _ in range(2)]
    for service in services:
        service.start()
    assert [service.wait() for service in services] == [0, 0]
    for service in services:
        service.close()
    for path in (GRAPH, "visual/preprocess_cfg.json", "config.json"):
        assert len(hub.asked(path)) == 1
    assert make_store(hub, tmp_path).status(KEY, digests=True).state is FileState.VERIFIED


def kill_again_and_again(hub: FakeHub, folder: Path, times: int) -> None:
    """Kill a fetch `times` times at random moments, then let one finish and check everything."""
    graph = onnx_bytes(400_000, seed=5)  # 100 chunks of 4 KiB
    hub.add("immich-app/ViT-B-32__openai", GRAPH, graph)
    hub.fail(GRAPH, forever=Fault(chunk_s=0.003))
    nursery = Nursery(folder, hub)
    rng = random.Random(6)
    for turn in range(times):
        asked = len(hub.asked(GRAPH))
        pid = nursery.start()
        while turn % 2 and len(hub.asked(GRAPH)) == asked and not target(folder).exists():
            time.sleep(0.001)  # every other time, not before the download has begun
        time.sleep(rng.uniform(0, 0.25))
        with suppress(ProcessLookupError):  # it was done already
            os.kill(pid, signal.SIGKILL)
        nursery.wait()
        if target(folder).exists():  # whole already: start from nothing again
            assert target(folder).read_bytes() == graph
            shutil.rmtree(folder / "clip")
    nursery.start()
    assert nursery.wait() == 0
    nursery.close()
    assert target(folder).read_bytes() == graph
    assert make_store(hub, folder).status(KEY, digests=True).state is FileState.VERIFIED
    assert any(seen.range for seen in hub.asked(GRAPH)), "no download went on from a killed one"


def target(folder: Path) -> Path:
    return folder / "clip" / "ViT-B-32__openai" / GRAPH


def test_killed_5_times_at_random_it_ends_with_verified_files(hub: FakeHub, tmp_path: Path) -> None:
    kill_again_and_again(hub, tmp_path, 5)


@pytest.mark.soak
def test_killed_50_times_at_random_it_ends_with_verified_files(
    hub: FakeHub, tmp_path: Path
) -> None:
    kill_again_and_again(hub, tmp_path, 50)


def test_ended_between_two_renames_it_needs_no_second_download(
    hub: FakeHub, tmp_path: Path
) -> None:
    store = make_store(hub, tmp_path)
    store.ensure(KEY)
    target(tmp_path).replace(store.shelf.staging(KEY) / GRAPH)
    make_store(hub, tmp_path).ensure(KEY)
    assert len(hub.asked(GRAPH)) == 1
    assert store.status(KEY, digests=True).state is FileState.VERIFIED


def test_ended_after_the_last_byte_it_needs_no_second_download(
    hub: FakeHub, tmp_path: Path
) -> None:
    store = make_store(hub, tmp_path)
    store.ensure(KEY)
    digest = load_manifest(store.shelf.root(KEY)).files[GRAPH].sha256
    staged = store.shelf.staging(KEY) / GRAPH
    target(tmp_path).replace(staged.with_name(f"model.onnx.{digest[:16]}.partial"))
    make_store(hub, tmp_path).ensure(KEY)
    assert len(hub.asked(GRAPH)) == 1


# -- a full disk -----------------------------------------------------------------------------------

FULL_DISK = """
import sys
from pathlib import Path
from immich_ml_metal.catalog import model_key
from immich_ml_metal.settings import Settings
from immich_ml_metal.errors import DownloadFailed
from immich_ml_metal.models.store import ModelStore
from immich_ml_metal.types import Part, Task

folder, url, fill = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "fill"
store = ModelStore(Settings(models_dir=folder, hub_endpoint=url))
good = store.ensure(model_key("buffalo_s", Task.FACES, Part.DETECTION)) if fill else None
before = good.graph.read_bytes() if good else None

def fill_disk(progress):
    with open(folder / "filler", "ab", buffering=0) as filler:
        try:
            while filler.write(bytes(2**16)):
                pass
        except OSError:
            pass

key = model_key("ViT-B-32__openai", Task.CLIP, Part.VISUAL)
try:
    store.ensure(key, fill_disk if fill else None)
except DownloadFailed as exc:
    print("refused:", exc)
if fill:
    assert not list(folder.rglob("*.partial"))
    assert good.graph.read_bytes() == before
    (folder / "filler").unlink()
    assert store.ensure(key).graph.is_file()
"""


def on_small_disk(folder: Path, size: str, *arguments: str) -> str:
    """Run FULL_DISK with `folder` on a file system of that size; what it printed."""
    mount = f"mount -t tmpfs -o size={size} none {folder} && exec"
    unshare = ["unshare", "-rm", "sh", "-c"]
    probe = [*unshare, f"{mount} true"]
    if not shutil.which("unshare") or subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("no small file system can be mounted here")
    done = subprocess.run(
        [*unshare, f'{mount} "$@"', "sh", sys.executable, "-c", FULL_DISK, str(folder), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SRC)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_download_that_cannot_fit_is_refused_before_it_starts(
    hub: FakeHub, tmp_path: Path
) -> None:
    said = on_small_disk(tmp_path, "1m", hub.url, "check")
    assert "not enough disk space" in said
    assert "67 MB needed" in said
    assert not hub.asked(GRAPH)


def test_a_disk_that_fills_up_meanwhile_costs_nothing_that_was_there(
    hub: FakeHub, tmp_path: Path
) -> None:
    hub.add("immich-app/ViT-B-32__openai", GRAPH, onnx_bytes(3_000_000))
    said = on_small_disk(tmp_path, "72m", hub.url, "fill")
    assert "the disk is full while writing" in said


def test_partial_files_are_named_by_their_digest() -> None:
    one, two = (RemoteFile("p", "u", 1, sha256=digit * 64) for digit in "ab")
    assert partial_path(one, Path("x")) != partial_path(two, Path("x"))
