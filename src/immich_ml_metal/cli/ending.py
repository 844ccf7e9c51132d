"""How the process ends: its streams, whatever became of them, and a failure in one line."""

import errno
import io
import os
import sys
from pathlib import Path
from typing import Any

from immich_ml_metal.cli.output import Exit
from immich_ml_metal.errors import ConfigError, ServiceError
from immich_ml_metal.system.listen import CannotListen
from immich_ml_metal.system.network_settings import network_troubles

_FULL = (errno.ENOSPC, errno.EDQUOT)


def open_streams() -> None:
    """Make standard output and error usable: a closed one is thrown away, no letter is refused."""
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by whoever started us; its number must not become a file's
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper) and name != "stdin":
            stream.reconfigure(errors="backslashreplace")


def ensure_home() -> None:
    """Give a process whose user has no home folder the one that Docker gives it: `/`.

    A container often runs as a number that no list of users knows; every `~` would end it.
    """
    try:
        Path.home()
    except RuntimeError:
        os.environ["HOME"] = "/"


def close_streams(code: Any) -> int:
    """Write out what is left; the exit code, which a full disk makes a failure.

    Args:
        code: what `sys.exit` was given: a number, None, or words.
    """
    failed = 0
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:  # the reader has seen enough
            _silence(stream)
        except OSError as exc:
            failed = 1
            _silence(stream)
            if stream is sys.stdout:
                sys.stderr.write(f"immich-ml-metal: cannot write the output: {exc.strerror}\n")
    if isinstance(code, str):
        sys.stderr.write(f"{code}\n")
        return 1
    return int(code or failed)


def _silence(stream: Any) -> None:
    """Let the interpreter's own flush at the end go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def explain(exc: Exception) -> str:
    """What ended a command, in one line."""
    if isinstance(exc, ServiceError):
        return " ".join(str(exc).splitlines())
    if isinstance(exc, MemoryError):
        return "out of memory; close other programs, or use smaller models"
    if isinstance(exc, OSError):
        reason = "the disk is full" if exc.errno in _FULL else (exc.strerror or str(exc))
        where = f"{exc.filename}: " if exc.filename is not None else ""
        return f"{where}{reason}{_blame(exc)}"
    words = " ".join(f"{type(exc).__name__}: {exc}".splitlines())
    return f"{words}{_blame(exc)} (ML_LOG_LEVEL=debug shows where)"


def exit_code(exc: Exception) -> Exit:
    """What scripts and service managers are told: a wrong setting ends a service for good.

    launchd starts again whatever does not end with 0, and names its job to it.
    """
    if not isinstance(exc, ConfigError) or isinstance(exc, CannotListen):
        return Exit.FINDING
    from immich_ml_metal.service.plan import JOB  # a library of its own, for a failure only

    return Exit.OK if os.environ.get("XPC_SERVICE_NAME") == JOB else Exit.USAGE


def debugging() -> bool:
    """Whether the environment asks for every detail, whatever a settings file says."""
    return os.environ.get("ML_LOG_LEVEL", "").lower() == "debug"


def _blame(exc: Exception) -> str:
    """The variables that keep libraries from working, if this may come from them."""
    if isinstance(exc, OSError) and exc.filename is not None:
        return ""
    return "".join(f"; {trouble}" for trouble in network_troubles())
