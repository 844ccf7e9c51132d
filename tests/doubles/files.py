"""A process that can open no more files, as one is whose limit is reached."""

import contextlib
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def no_more_files() -> Iterator[None]:
    """What is open stays so, and nothing else can be opened in this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def limit_of(pid: int, what: int, soft: int | None = None) -> int:
    """The soft limit of another process, and set it; the hard one stays."""
    if sys.platform != "linux":
        pytest.skip("only Linux sets the limits of another process")
    was, hard = resource.prlimit(pid, what)
    if soft is not None:
        resource.prlimit(pid, what, (soft, hard))
    return was


def let_open(pid: int, more: int) -> None:
    """Let another process have so many more files open than it has now."""
    used = {int(path.name) for path in Path(f"/proc/{pid}/fd").iterdir()}
    free = (number for number in range(len(used) + more + 1) if number not in used)
    last = max(used)
    for _ in range(more):
        last = max(last, next(free, last + 1))
    limit_of(pid, resource.RLIMIT_NOFILE, last + 1)
