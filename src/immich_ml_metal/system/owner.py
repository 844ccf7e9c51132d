"""Files written whole, and their user's when root makes them in a folder of that user.

Under sudo, the service itself could not read them otherwise.
"""

import os
import threading
from contextlib import suppress
from pathlib import Path

_NEW = os.O_WRONLY | os.O_CREAT | os.O_TRUNC


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
    """Replace a file as a whole: a full disk or a power cut leaves the old one or the new one.

    With `is_private` only its owner may read it. A folder that is not there is made.

    Raises:
        OSError: with the file's name, which a full disk does not tell.
    """
    path = path.resolve()  # a link to it stays one
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(content)  # a pipe or a terminal
        else:
            make_folder(path.parent)
            _replace(path, content, 0o600 if is_private else 0o666)
    except OSError as exc:
        exc.filename = str(path)
        raise


def _replace(path: Path, content: bytes, mode: int) -> None:
    staged = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}")
    try:
        with os.fdopen(os.open(staged, _NEW, mode), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        hand_over(staged, path if path.exists() else path.parent)
        staged.replace(path)
    except BaseException:
        with suppress(OSError):  # a read-only disk, which says so of a file that is not there too
            staged.unlink(missing_ok=True)
        raise
