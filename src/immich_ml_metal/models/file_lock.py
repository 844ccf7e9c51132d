"""One process at a time at a place in the model folder; the system frees the lock of a dead one.

On a share without locks the work goes on without one, with a warning: a model that can never be
fetched is worse than one fetched twice, and files are renamed into place whole either way.
"""

import errno
import fcntl
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)

_POLL_S = 0.1
# Where the share has no locks, at least the threads of this process take turns.
_HERE = threading.RLock()
_WARNED = threading.Event()  # once in a process


class Held(Exception):
    """Somebody else holds the lock."""


@contextmanager
def hold(path: Path, *, wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold the lock at `path`, whose folder is made.

    Args:
        path: the lock file; it stays.
        wait: called again and again while somebody else holds it; it may raise to give up. Without
            it a held lock is not waited for.

    Raises:
        Held: somebody else holds it, and `wait` is None.
        OSError: the file cannot be opened.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if _turn(wait, lambda: _lock(fd, path)):
            yield
            return
        _turn(wait, lambda: _HERE.acquire(blocking=False) or None)
        try:
            yield
        finally:
            _HERE.release()
    finally:
        os.close(fd)  # frees the lock


def patiently() -> None:
    """For a lock that is never held for long."""


def _turn(wait: Callable[[], None] | None, take: Callable[[], bool | None]) -> bool:
    """Try until `take` says more than None."""
    while (taken := take()) is None:
        if wait is None:
            raise Held
        wait()
        time.sleep(_POLL_S)
    return taken


def _lock(fd: int, path: Path) -> bool | None:
    """True when locked, None when somebody else has it, False where there are no locks."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as exc:
        if exc.errno in (errno.EWOULDBLOCK, errno.EINTR):
            return None
        if not _WARNED.is_set():
            _WARNED.set()
            logger.warning(
                "no file locks on %s (%s): going on without; do not run two downloads into it",
                path.parent,
                exc.strerror,
            )
        return False
    return True
