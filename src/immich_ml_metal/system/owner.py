"""Files for a person: whole, and theirs when root makes them in their folder.

Under sudo, the service itself could not read them otherwise.
"""

import os
from pathlib import Path


def make_folder(folder: Path) -> None:
    """Make a folder and those above it; each belongs to the owner of the one that it is made in."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    hand_over(folder, folder.parent)


def hand_over(made: Path | int, folder: Path) -> None:
    """Give what root has just made (a path or an open file) to the owner of a folder."""
    if os.geteuid() != 0:
        return
    owner = folder.stat()
    if isinstance(made, int):
        os.fchown(made, owner.st_uid, owner.st_gid)
    else:
        os.chown(made, owner.st_uid, owner.st_gid, follow_symlinks=False)


def write_whole(path: Path, content: bytes, *, is_private: bool = False) -> None:
    """Write a file for a person, all of it or nothing; with `is_private` only its owner may read.

    A folder that is not there is made.

    Raises:
        OSError: with the file's name, which a full disk does not tell.
    """
    path = path.resolve()  # a link to it stays one
    if path.exists() and not path.is_file():
        path.write_bytes(content)  # a pipe or a terminal
        return
    make_folder(path.parent)
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    flags, mode = os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600 if is_private else 0o666
    try:
        with os.fdopen(os.open(staged, flags, mode), "wb") as file:
            file.write(content)
        hand_over(staged, path if path.exists() else path.parent)
        staged.replace(path)
    except OSError as exc:
        exc.filename = str(path)
        staged.unlink(missing_ok=True)
        raise
