"""How the process ends: its streams, whatever became of them, and a failure in one line."""

import io
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from immich_ml_metal.cli.output import Exit, print_error
from immich_ml_metal.errors import ConfigError, ServiceError
from immich_ml_metal.system.disk import reason_of
from immich_ml_metal.system.listen import CannotListen
from immich_ml_metal.system.network_settings import network_troubles

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class _Output(io.FileIO):
    """Standard output. A reader that has seen enough ends the command, without a word.

    What is written after a failure goes nowhere, so that it is told once.
    """

    _has_failed = False

    def write(self, data: "ReadableBuffer", /) -> int:
        """Write some of it."""
        if self._has_failed:
            return memoryview(data).nbytes
        try:
            return super().write(data)
        except BrokenPipeError:
            self._has_failed = True
            sys.exit(Exit.READER_GONE)
        except OSError as exc:
            self._has_failed = True
            exc.filename = "standard output"
            raise


class _Complaints(io.FileIO):
    """Standard error. What it cannot take is lost: there is nobody left to tell."""

    def write(self, data: "ReadableBuffer", /) -> int:
        """Write some of it."""
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


_RAW = {"stdout": _Output, "stderr": _Complaints}


def open_streams() -> None:
    """Make standard output and error usable: a closed one is thrown away, no letter is refused."""
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by whoever started us; its number must not become a file's
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper) and name != "stdin":
            raw = _RAW[name](stream.fileno(), "w", closefd=False)
            text = io.TextIOWrapper(
                io.BufferedWriter(raw),
                stream.encoding,
                "backslashreplace",
                line_buffering=stream.line_buffering,
            )
            setattr(sys, name, text)


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
    try:
        sys.stdout.flush()
    except SystemExit:  # the reader has seen enough, and the command is done
        pass
    except OSError as exc:
        failed = Exit.FINDING
        print_error(explain(exc))
    if isinstance(code, str):
        sys.stderr.write(f"{code}\n")
        return 1
    return int(code or failed)


def explain(exc: Exception) -> str:
    """What ended a command, in one line."""
    if isinstance(exc, ServiceError):
        return " ".join(str(exc).splitlines())
    if isinstance(exc, MemoryError):
        return "out of memory; close other programs, or use smaller models"
    if isinstance(exc, OSError):
        where = f"{exc.filename}: " if exc.filename is not None else ""
        return f"{where}{reason_of(exc)}{_blame(exc)}"
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
