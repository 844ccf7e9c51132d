"""A disk that is full, over its quota or read-only, for the processes that a test runs."""

import errno
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_suffix(".c")
WORDS = {
    "ENOSPC": "the disk is full",
    "EDQUOT": "the disk quota is used up",
    "EROFS": "the disk is read-only",
}


@cache
def _library(folder: Path) -> Path:
    library = folder / f"full_disk_{SOURCE.stat().st_mtime_ns}.so"
    compiler = shutil.which("gcc")
    if compiler is None or not Path("/proc/self/fd").exists():
        pytest.skip("without gcc and Linux there is no disk that refuses what is written")
    if not library.exists():
        staged = folder / f"{library.name}.{id(folder)}"
        flags = ("-shared", "-fPIC", "-O1", "-Wall", "-Werror")
        subprocess.run([compiler, *flags, "-o", str(staged), str(SOURCE), "-ldl"], check=True)
        staged.replace(library)
    return library


def refusing(disk: Path, trouble: str, built: Path, until: Path | None = None) -> dict[str, str]:
    """Variables under which nothing can be written in `disk`.

    Args:
        disk: the folder; what is there stays readable.
        trouble: `ENOSPC`, `EDQUOT` or `EROFS`.
        built: a folder for the library.
        until: a file; the disk takes everything once it is gone.
    """
    given = {
        "LD_PRELOAD": str(_library(built)),
        "FULL_DISK": str(disk),
        "FULL_ERRNO": str(getattr(errno, trouble)),
    }
    return given | ({"FULL_WHILE": str(until)} if until is not None else {})
