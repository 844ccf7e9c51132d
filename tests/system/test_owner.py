"""What root writes in a user's folder is the user's: `sudo` must not lock the service out."""

import os
from pathlib import Path

import pytest

from immich_ml_metal.cli.config import write_private
from immich_ml_metal.immich.records import claim
from immich_ml_metal.state import StateFolder
from immich_ml_metal.system.owner import write_whole

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
USER = 1234


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    os.chown(folder, USER, USER + 1)
    return folder


def owners(folder: Path) -> set[tuple[int, int]]:
    return {(one.stat().st_uid, one.stat().st_gid) for one in folder.rglob("*")}


def test_settings_that_root_writes_belong_to_the_owner_of_the_folder(home: Path) -> None:
    file = home / ".config" / "immich-ml-metal" / "config.toml"
    write_private(file, "port = 1\n")
    assert owners(home) == {(USER, USER + 1)}
    assert file.stat().st_mode & 0o777 == 0o600


def test_settings_that_are_there_keep_their_owner(home: Path) -> None:
    file = home / "config.toml"
    file.touch()
    os.chown(file, USER + 2, USER + 2)
    write_private(file, "port = 1\n")
    assert owners(home) == {(USER + 2, USER + 2)}


def test_state_that_root_writes_belongs_to_the_owner_of_the_folder(home: Path) -> None:
    folder = home / ".local" / "state" / "immich-ml-metal"
    for number in range(2):
        StateFolder(folder).write("queues", 1, {"number": number})
        assert owners(home) == {(USER, USER + 1)}


def test_the_lock_of_the_records_of_queues_too(home: Path) -> None:
    claim(StateFolder(home / "state")).close()
    assert owners(home) == {(USER, USER + 1)}


def test_a_file_for_a_person_makes_its_folder_and_theirs(home: Path) -> None:
    write_whole(home / "new" / "newer" / "report.html", b"words")
    assert (home / "new" / "newer" / "report.html").read_bytes() == b"words"
    assert owners(home) == {(USER, USER + 1)}
