"""Files that root makes in a user's folder: under sudo, the service itself could not read them."""

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
