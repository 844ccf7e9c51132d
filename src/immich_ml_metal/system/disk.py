"""What a disk has against being written to, in plain words."""

import errno

FULL = (errno.ENOSPC, errno.EDQUOT)
_WORDS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the disk is read-only",
}
_CLOSED = (errno.EROFS, errno.EACCES, errno.EPERM)


def is_of_the_disk(exc: OSError) -> bool:
    """Whether it passes when the disk is mended, and is no fault of the path."""
    return exc.errno in _WORDS


def reason_of(exc: OSError) -> str:
    """The failure alone, without its place."""
    return _WORDS.get(exc.errno or 0, exc.strerror or str(exc))


def explain_write(exc: OSError, place: object, variable: str = "") -> str:
    """The failure, its place, and what may help.

    Args:
        exc: what a write met.
        place: the file or folder.
        variable: what names another disk; empty where the user gave the place itself.
    """
    elsewhere = f" or set {variable}" if variable else ""
    if exc.errno in FULL:
        return f"{reason_of(exc)} while writing {place}; free some space{elsewhere}"
    hint = "; make it writable" if exc.errno in _CLOSED and variable else ""
    return f"cannot write {place}: {reason_of(exc)}{hint}{hint and elsewhere}"
