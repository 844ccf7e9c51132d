"""The kinds of values that settings take, and how their text is read."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([kmg]?)i?b?\s*$", re.IGNORECASE)
_PASSWORD = re.compile(r"(?<=://)[^/\s'\"]+(?=@)")  # of an address, with its user
_LOG_LEVELS = {
    "critical": "error",
    "warn": "warning",
    "log": "info",
    "verbose": "debug",
}


def _parse_size(value: Any) -> Any:
    """`64MB`, `1.5 GiB` or plain bytes → bytes; both prefix spellings are powers of 1024."""
    if isinstance(value, str) and (match := _SIZE.match(value)):
        return int(float(match[1]) * 1024 ** ("kmg".find(match[2].lower()) + 1 if match[2] else 0))
    return value


def format_bytes(size_bytes: float) -> str:
    """A size as a person reads it, in powers of 1000 as disks and hubs count.

    >>> format_bytes(351_400_000)
    '351 MB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if size_bytes < 1000 or unit == "GB":
            digits = 1 if unit == "GB" or (size_bytes < 10 and unit != "B") else 0
            return f"{size_bytes:.{digits}f} {unit}"
        size_bytes /= 1000
    raise AssertionError("unreachable")


def _split(value: Any) -> Any:
    """`a, b` → (a, b)."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


def _log_level(value: Any) -> Any:
    """Accept the official service's spellings."""
    return _LOG_LEVELS.get(value.lower(), value.lower()) if isinstance(value, str) else value


def _flag(value: Any) -> Any:
    """`NO_COLOR` counts with any text in it; only 0 and false say no."""
    return (
        value.strip().lower() not in ("", "0", "false", "no") if isinstance(value, str) else value
    )


def _known_place(path: Path) -> Path:
    """Refuse a path that no file can have; `~` stays as it is written."""
    if "\0" in str(path):
        raise ValueError("no path holds a NUL")
    try:
        path.expanduser()
    except RuntimeError:
        raise ValueError(f"there is no user {path.parts[0][1:]} here") from None
    return path


def hide_passwords(text: str) -> str:
    """The same text without the user and password that an address in it may carry."""
    return _PASSWORD.sub("***", text)


Size = Annotated[int, BeforeValidator(_parse_size), Field(ge=1)]
SizeOrZero = Annotated[int, BeforeValidator(_parse_size), Field(ge=0)]
Place = Annotated[Path, AfterValidator(_known_place)]
Names = Annotated[tuple[str, ...], BeforeValidator(_split)]
Rewritings = Annotated[
    tuple[Literal["all", "off", "rows", "length", "gelu", "upscaling"], ...],
    BeforeValidator(_split),
]
Flag = Annotated[bool, BeforeValidator(_flag)]
LogLevel = Annotated[Literal["error", "warning", "info", "debug"], BeforeValidator(_log_level)]


def setting(default: Any, env: str, *official: str, help: str, **limits: Any) -> Any:
    """One setting: its default, its `ML_*` name, the official names for it, a line of help."""
    names: dict[str, Any] = {"env": [env, *official]}
    return Field(default, description=help, json_schema_extra=names, **limits)
