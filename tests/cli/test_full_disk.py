"""Every command that writes, on a disk that refuses: one line that says where and why; no harm."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from doubles.full_disk import WORDS, refusing
from doubles.hub import FakeHub
from doubles.live import serve
from doubles.mini_service import MiniService
from doubles.tiny_models import CLIP, FACES, OCR, draw_faces

FILLED = "mount -t tmpfs -o size=16k none {0} && echo kept > {0}/old && cat /dev/zero > {0}/fill"
HALVES = ("visual", "textual")


def test_a_disk_that_is_really_full_is_named_with_the_file_and_harms_none(tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    unshare = ["unshare", "-rm", "sh", "-c"]
    probe = [*unshare, f"mount -t tmpfs -o size=16k none {full}"]
    if not shutil.which("unshare") or subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("no small file system can be mounted here")
    command = f"{sys.executable} -m immich_ml_metal config init --force {full}/old"
    script = (
        f"{FILLED.format(full)} 2>/dev/null; {command}; echo code $?; cd {full}; cat old; ls -A"
    )
    done = subprocess.run(
        [*unshare, script],
        capture_output=True,
        text=True,
        env={**os.environ, "HOME": str(tmp_path), "ML_STATE_DIR": str(tmp_path / "state")},
    )
    (said,) = done.stderr.splitlines()
    assert said == f"immich-ml-metal: {full}/old: the disk is full"
    assert done.stdout.split("code ")[1].split() == ["1", "kept", "fill", "old"]


@dataclass(frozen=True)
class Writer:
    """A command that writes on the disk, which holds a file `old`.

    Attributes:
        words: of the command.
        place: what is named.
        variable: what is named as the way to another disk.
        folders: are there already, so that it comes to writing; each holds a file of old.
        code: it ends with.
        gives: what is set for it, on the disk.
    """

    words: str
    place: str
    variable: str = ""
    folders: tuple[str, ...] = ()
    gives: tuple[str, ...] = ()
    code: int = 1


MODELS = tuple(f"models/clip/{CLIP}/{half}" for half in HALVES)
INCOMING = tuple(f"models/clip/{CLIP}/.incoming/{half}/{half}" for half in HALVES)
PLACES = ("models/.locks", *MODELS)
UNITS, SETTINGS = "home/.config/systemd/user", "home/.config/immich-ml-metal"
LOGS = "home/.local/state/immich-ml-metal"
OLD = {UNITS: "immich-ml-metal.service"}
WRITERS = {
    "settings": Writer("config init {disk}/new.toml", "new.toml"),
    "settings that are there": Writer("config init --force {disk}/old", "old"),
    "bundle": Writer("doctor --no-test --share {disk}/bundle.zip", "bundle.zip"),
    "engines' report": Writer(f"qualify {FACES} --share {{disk}}/r.md", "r.md"),
    "parity's page": Writer(
        "parity {photos} --url {mini} --against {mini} --html {disk}/r.html", "r.html"
    ),
    "drawing": Writer("demo {photos}/a.png --output {disk}/new/a.png", "new"),
    "drawing in a folder that is there": Writer(
        "demo {photos}/a.png --output {disk}/old.png", "old.png"
    ),
    "download": Writer(
        f"models pull {CLIP}", "models", "ML_MODELS_DIR", gives=("ML_MODELS_DIR",), code=3
    ),
    "download into folders that are there": Writer(
        f"models pull {CLIP}",
        "models",
        "ML_MODELS_DIR",
        folders=(*PLACES, *INCOMING),
        gives=("ML_MODELS_DIR",),
        code=3,
    ),
    "import": Writer("models import {models}", "models", "ML_MODELS_DIR", gives=("ML_MODELS_DIR",)),
    "import into folders that are there": Writer(
        "models import {models}", "models", "ML_MODELS_DIR", PLACES, ("ML_MODELS_DIR",)
    ),
    "export": Writer(f"models export {CLIP} --to {{disk}}/out", "out"),
    "export into folders that are there": Writer(
        f"models export {CLIP} --to {{disk}}", "", "", tuple(f"clip/{CLIP}/{h}" for h in HALVES)
    ),
    "archive": Writer(f"models export {CLIP} --to {{disk}}/out.zip", "out.zip"),
    "accepted index": Writer(
        f"models accept {CLIP}", "state", "ML_STATE_DIR", gives=("ML_STATE_DIR",)
    ),
    "accepted index beside others": Writer(
        f"models accept {CLIP}", "state", "ML_STATE_DIR", ("state",), ("ML_STATE_DIR",)
    ),
    "service": Writer("service install", "home", gives=("HOME",)),
    "settings of a service": Writer(
        "service install",
        f"{SETTINGS}/config.toml",
        folders=(SETTINGS,),
        gives=("HOME", "ML_STATE_DIR"),
    ),
    "service with a unit that is there": Writer(
        "service install", f"{UNITS}/{OLD[UNITS]}", folders=(UNITS, LOGS), gives=("HOME",)
    ),
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("built")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    (folder / "a.png").write_bytes(draw_faces((160, 160)))
    return folder


@pytest.fixture(scope="module")
def mini() -> Iterator[str]:
    with serve(MiniService().app) as url:
        yield url


def content(disk: Path) -> dict[str, bytes]:
    """What is on it, but for locks and the folder that they are in."""
    places = {str(one.relative_to(disk)): one for one in disk.rglob("*")}
    return {
        name: one.read_bytes() if one.is_file() else b""
        for name, one in places.items()
        if one.suffix not in (".lock", ".locks")
    }


def surroundings(tmp_path: Path, models: Path, hub: FakeHub, writer: Writer) -> dict[str, str]:
    """The variables of a command; a `systemctl` that takes everything."""
    tool = tmp_path / "tools" / "systemctl"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    given = {
        "HOME": str(tmp_path / "home"),
        "PATH": f"{tool.parent}:{os.environ['PATH']}",
        "COLUMNS": "200",
        "ML_STATE_DIR": str(tmp_path / "state"),
        "ML_MODELS_DIR": str(models),
        "ML_FACE_MODEL": FACES,
        "ML_OCR_MODEL": OCR,
        "HF_ENDPOINT": hub.url,
    }
    if writer.gives == ("HOME",):  # nothing is set that would have to be kept in a file
        given = {name: given[name] for name in ("HOME", "PATH")}
    places = {"HOME": "home", "ML_STATE_DIR": "state", "ML_MODELS_DIR": "models"}
    return given | {name: f"{tmp_path}/disk/{places[name]}" for name in writer.gives}


@pytest.mark.parametrize(
    ("name", "trouble"),
    [(name, trouble) for name in WRITERS for trouble in ("ENOSPC", "EROFS")]
    + [(name, "EDQUOT") for name in ("bundle", "accepted index beside others", "download")],
)
def test_a_command_whose_disk_refuses_says_so_in_a_line_and_harms_nothing(
    name: str,
    trouble: str,
    models: Path,
    photos: Path,
    mini: str,
    hub: FakeHub,
    built: Path,
    tmp_path: Path,
) -> None:
    writer, disk = WRITERS[name], tmp_path / "disk"
    for folder in (".", *writer.folders):
        (disk / folder).mkdir(parents=True, exist_ok=True)
    for old in ("old", "old.png", *(f"{one}/{OLD.get(one, 'old')}" for one in writer.folders)):
        (disk / old).write_text("old")
    before = content(disk)
    words = writer.words.format(disk=disk, models=models, photos=photos, mini=mini).split()
    done = subprocess.run(
        [sys.executable, "-m", "immich_ml_metal", *words],
        capture_output=True,
        text=True,
        timeout=120,
        env=surroundings(tmp_path, models, hub, writer) | refusing(disk, trouble, built),
    )
    said = [line for line in done.stderr.splitlines() if WORDS[trouble] in line]
    assert done.returncode == writer.code, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert len(said) == 1 or writer.code == 3, done.stderr  # a line for each half
    assert {str(disk / writer.place) in line and writer.variable in line for line in said} == {True}
    assert content(disk) == before
