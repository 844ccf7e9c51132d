"""The log files of an installed service: where they lie, their end, and what is added to them."""

import platform
from pathlib import Path

from immich_ml_metal.logs import file_of, stderr_of
from immich_ml_metal.settings import Settings


def log_folder(system: str | None = None) -> Path:
    """Where a user's service logs on this system."""
    if (system or platform.system()) == "Darwin":
        return Path.home() / "Library" / "Logs" / "immich-ml-metal"
    return Path.home() / ".local" / "state" / "immich-ml-metal"


def log_files(settings: Settings) -> list[Path]:
    """The logs of both processes, and of what they could not log."""
    log = settings.log_file or log_folder() / "service.log"
    return [file_of(log, "gateway"), file_of(log, "worker"), stderr_of(log)]


def tail(file: Path, lines: int) -> list[str]:
    """The last lines of a file; a log file is capped, so it is read whole."""
    return file.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]


def new_text(file: Path, seen_bytes: int) -> tuple[str, int]:
    """What was added since `seen_bytes`, and the new position; a new file counts whole."""
    try:
        size = file.stat().st_size
        if size == seen_bytes:
            return "", size
        with file.open("rb") as stream:
            stream.seek(seen_bytes if size > seen_bytes else 0)
            added = stream.read()
            return added.decode("utf-8", errors="replace"), stream.tell()
    except FileNotFoundError:  # between rotation and the next line
        return "", 0
