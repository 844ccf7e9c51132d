"""Follow a file that is rotated or emptied under the reader."""

from pathlib import Path


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
