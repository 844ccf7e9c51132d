"""Paths as people write them: `~` for home, and files that turn out to be something else."""

import os
import stat
from pathlib import Path

from immich_ml_metal.errors import ConfigError


def at_home(path: Path) -> Path:
    """The path with a home folder in place of `~` or `~name`.

    Raises:
        ConfigError: there is no user of that name.
    """
    try:
        return path.expanduser()
    except RuntimeError as exc:
        raise ConfigError(f"{path}: there is no user {path.parts[0][1:]} here") from exc


def read_settings_text(path: Path, kind: str) -> str:
    """The text of a file that a person wrote, read to its end without waiting for anybody.

    A pipe is refused: settings are read more than once, and it has them but once.

    Args:
        path: the file; `/dev/null` is an empty one.
        kind: what the file is called in a message.

    Raises:
        ConfigError: it cannot be read, or is not text; the message names the place.
    """
    found = at_home(path)
    try:
        if stat.S_ISDIR(mode := found.stat().st_mode) or stat.S_ISREG(mode):
            content = found.read_bytes()
        elif found.samefile(os.devnull):
            content = b""
        else:
            raise ConfigError(f"cannot read the {kind} {path}: it is a pipe or a device")
    except OSError as exc:
        raise ConfigError(f"cannot read the {kind} {path}: {exc.strerror}") from exc
    try:
        return content.decode("utf-8-sig")  # an editor on Windows marks its files
    except UnicodeDecodeError as exc:
        line = content[: exc.start].count(b"\n") + 1
        where = f"line {line}, byte {exc.start + 1}"
        raise ConfigError(f"{kind} {path} is not UTF-8 ({where}); save it as UTF-8") from exc
