"""Files are written whole, and what root writes in a user's folder is the user's.

`sudo` must not lock the service out.
"""

import os
from pathlib import Path

import pytest

from immich_ml_metal.cli.config import write_private
from immich_ml_metal.immich.records import claim
from immich_ml_metal.qualification.record import Record
from immich_ml_metal.state import StateFolder
from immich_ml_metal.system.owner import write_whole
from immich_ml_metal.types import ModelKey, Part, Task

USER = 1234


@pytest.fixture
def users(tmp_path: Path) -> Path:
    """A folder of a user who is not root."""
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    folder = tmp_path / "home"
    folder.mkdir()
    os.chown(folder, USER, USER + 1)
    return folder


def owners(folder: Path) -> set[tuple[int, int]]:
    return {(one.stat().st_uid, one.stat().st_gid) for one in folder.rglob("*")}


def test_settings_that_root_writes_belong_to_the_owner_of_the_folder(users: Path) -> None:
    file = users / ".config" / "immich-ml-metal" / "config.toml"
    write_private(file, "port = 1\n")
    assert owners(users) == {(USER, USER + 1)}
    assert file.stat().st_mode & 0o777 == 0o600


def test_settings_that_are_there_keep_their_owner(users: Path) -> None:
    file = users / "config.toml"
    file.touch()
    os.chown(file, USER + 2, USER + 2)
    write_private(file, "port = 1\n")
    assert owners(users) == {(USER + 2, USER + 2)}


def test_state_that_root_writes_belongs_to_the_owner_of_the_folder(users: Path) -> None:
    folder = users / ".local" / "state" / "immich-ml-metal"
    for number in range(2):
        StateFolder(folder).write("queues", 1, {"number": number})
        assert owners(users) == {(USER, USER + 1)}


def test_the_lock_of_the_records_of_queues_too(users: Path) -> None:
    claim(StateFolder(users / "state")).close()
    assert owners(users) == {(USER, USER + 1)}


def test_the_verdicts_on_engines_too(users: Path) -> None:
    key = ModelKey(Task.FACES, Part.DETECTION, "buffalo_l")
    Record(StateFolder(users / "new" / "state")).change(key, lambda entry: entry)
    assert owners(users) == {(USER, USER + 1)}
    assert len(owners(users / "new")) == 1


def test_a_file_for_a_person_makes_its_folder_and_theirs(users: Path) -> None:
    write_whole(users / "new" / "newer" / "report.html", b"words")
    assert (users / "new" / "newer" / "report.html").read_bytes() == b"words"
    assert owners(users) == {(USER, USER + 1)}


def test_a_power_cut_leaves_the_old_content_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    on_disk: list[bytes] = []

    def sync(descriptor: int) -> None:  # what is not synced before it takes the name may be lost
        assert not path.exists() or path.read_bytes() == b"old"
        on_disk.append(Path(f"/dev/fd/{descriptor}").resolve().read_bytes())

    monkeypatch.setattr(os, "fsync", sync)
    for content in (b"old", b"new"):
        write_whole(path, content)
        assert path.read_bytes() == on_disk[-1] == content
    assert list(path.parent.iterdir()) == [path]


def test_what_cannot_be_written_leaves_the_old_file_and_its_name_is_told(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left") as raised:
        write_whole(Path("/dev/full"), b"new")
    assert raised.value.filename == "/dev/full"
