"""One line per event: for people on a terminal, as JSON for machines, in capped files if asked.

Modules log through the standard library with lazy arguments and write facts as `key=%s`; the
formatters here find those facts again, so the same call serves both outputs. Knows nothing about
HTTP: the servers put a request's id into `request_id` with `request_scope`.
"""

import contextlib
import errno
import logging
import logging.handlers
import re
import secrets
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TextIO

import orjson

from immich_ml_metal.errors import ConfigError
from immich_ml_metal.setting_kinds import hide_passwords
from immich_ml_metal.settings import Settings

REQUEST_ID_HEADER = "X-Request-Id"  # from the gateway to the worker, and back to the caller
STDERR_CAP_BYTES = 2**20
# What a log file may grow to, and how many older ones are kept: some 100,000 lines each.
FILE_BYTES = 10 * 2**20
FILES_KEPT = 3

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)

_SPECIFIER = re.compile(r"%(?:%|[-#0 +]*\d*(?:\.\d+)?[a-zA-Z])")
_FACT = re.compile(r"(?:^|[\s,(])([A-Za-z_]\w*)=$")
_SAFE_ID = re.compile(r"[\w.:-]{1,64}")
# What a secret looks like when it slips into a message: hub tokens, API keys.
_SECRETS = (
    re.compile(r"\bhf_[A-Za-z0-9]{8,}"),
    re.compile(r"(?i)(?<=x-api-key[:=])\s*\S+|(?<=bearer )\S+"),
)
_QUERY = re.compile(r"(?<=[\w/])\?[^\s'\"]+=[^\s'\"]*")
_COLOURS = {"DEBUG": "2", "INFO": "32", "WARNING": "33", "ERROR": "31", "CRITICAL": "31"}
# Their INFO lines repeat ours, or carry whole addresses with their queries.
_NOISY = ("httpx", "httpcore", "uvicorn.access", "huggingface_hub", "PIL", "filelock")


def new_request_id() -> str:
    """A short id for one request."""
    return secrets.token_hex(6)


@contextmanager
def request_scope(sent: str | None = None) -> Iterator[str]:
    """Give every line logged in the body the same request id: the sent one, if sane, or a new one.

    Threads see it only when their work is started with a copied context (`asyncio.to_thread` does).
    """
    current = sent if sent is not None and _SAFE_ID.fullmatch(sent) else new_request_id()
    token = request_id.set(current)
    try:
        yield current
    finally:
        request_id.reset(token)


def configure_logging(
    settings: Settings,
    process: str,
    *,
    stream: TextIO | None = None,
    file_bytes: int = FILE_BYTES,
) -> None:
    """Send every logger's lines where the settings say; called once per process, by the CLI.

    With a log file, the stream gets lines only when it is a terminal: what a service manager keeps
    of it is then only what could not be logged.

    `process` (`gateway` or `worker`) names the lines, and the worker's own file.

    Raises:
        ConfigError: the log file cannot be written.
    """
    chosen = sys.stderr if stream is None else stream
    handlers = _make_handlers(settings, process, chosen, file_bytes)
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    for handler in handlers:
        root.addHandler(handler)
    root.setLevel(settings.log_level.upper())
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.WARNING)


def check_log_file(settings: Settings) -> None:
    """Try whether the log can be written.

    Raises:
        ConfigError: it cannot.
    """
    if settings.log_file is not None:
        _file_handler(settings, "gateway", [], FILE_BYTES).close()


def _make_handlers(
    settings: Settings, process: str, stream: TextIO | None, file_bytes: int
) -> list[logging.Handler]:
    """`stream` is None in a Python without a standard error."""
    known = [settings.immich_api_key.get_secret_value()] if settings.immich_api_key else []
    on_terminal = stream is not None and stream.isatty()
    handlers: list[logging.Handler] = []
    if settings.log_file is None or on_terminal:
        colour = on_terminal and not settings.no_color
        handlers.append(logging.StreamHandler(stream))
        handlers[0].setFormatter(_formatter(settings, process, known, colour=colour))
    if settings.log_file is not None:
        handlers.append(_file_handler(settings, process, known, file_bytes))
    return handlers


def file_of(log_file: Path, process: str) -> Path:
    """Each process rotates a file of its own: `x.log` for the gateway, `x.worker.log` beside it."""
    path = log_file.expanduser()
    return path if process == "gateway" else path.with_suffix(f".{process}{path.suffix}")


def stderr_of(log_file: Path) -> Path:
    """Where a service manager keeps what could not be logged: beside the log."""
    return log_file.expanduser().with_suffix(".stderr")


def cap_file(path: Path, limit_bytes: int = STDERR_CAP_BYTES) -> None:
    """Empty a file that another process holds open for appending, once it is over the limit.

    launchd keeps its handle on standard error, so that file cannot be renamed away.
    """
    if path.is_file() and path.stat().st_size > limit_bytes:
        with path.open("r+b") as file:
            file.truncate(0)


def _formatter(
    settings: Settings, process: str, known: list[str], *, colour: bool
) -> logging.Formatter:
    if settings.log_format == "json":
        return JsonFormatter(process, known)
    return TextFormatter(process, known, colour=colour)


class _PatientFileHandler(logging.handlers.RotatingFileHandler):
    """A file that may fill its disk: said once each time that begins, without a traceback."""

    _is_told = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        reason = sys.exc_info()[1]
        if not isinstance(reason, OSError):
            super().handleError(record)
        elif not self._is_told:
            self._is_told = True
            why = reason.strerror or reason
            sys.stderr.write(f"the log file {self.baseFilename} lacks lines from here: {why}\n")

    def flush(self) -> None:
        super().flush()
        self._is_told = False

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what was lost is told
            super().close()


def _file_handler(
    settings: Settings, process: str, known: list[str], limit_bytes: int
) -> logging.Handler:
    assert settings.log_file is not None
    path = file_of(settings.log_file, process)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _refuse_pipe(path)
        cap_file(stderr_of(settings.log_file))
        handler = _PatientFileHandler(
            path, maxBytes=limit_bytes, backupCount=FILES_KEPT, encoding="utf-8"
        )
    except OSError as exc:
        reason = exc.strerror or exc
        raise ConfigError(f"cannot write the log file {path}: {reason} (ML_LOG_FILE)") from exc
    handler.setFormatter(_formatter(settings, process, known, colour=False))
    return handler


def _refuse_pipe(path: Path) -> None:
    """To open one for writing waits for somebody who reads."""
    if path.is_fifo():
        raise OSError(errno.ESPIPE, "it is a pipe")


def split_facts(message: str, args: Any) -> tuple[str, dict[str, Any]]:
    """The event in words and its facts: `("loaded %s in ms=%d", ("a", 5))` → `loaded a`, `{ms: 5}`.

    Only `key=%s` placeholders become facts; the other placeholders stay in the words.
    """
    if not isinstance(args, tuple):  # logging's single-mapping form, or no arguments at all
        return (message % args if args else message), {}
    words, facts, rest, end = "", {}, list(args), 0
    for match in _SPECIFIER.finditer(message):
        words += message[end : match.start()]
        end = match.end()
        if match[0] == "%%":
            words += "%"
        elif fact := _FACT.search(words):
            facts[fact[1]] = rest.pop(0)
            words = words[: fact.start()]
        else:
            words += match[0] % rest.pop(0)
    return (words + message[end:]).strip(" ,"), facts


def redact(text: str, known: list[str]) -> str:
    """Blot out secrets and the query part of addresses."""
    for secret in known:
        text = text.replace(secret, "***") if secret else text
    for pattern in _SECRETS:
        text = pattern.sub("***", text)
    return _QUERY.sub("?***", hide_passwords(text))


class JsonFormatter(logging.Formatter):
    """One JSON object per event."""

    def __init__(self, process: str, known: list[str]) -> None:
        super().__init__()
        self._process = process
        self._known = known

    def format(self, record: logging.LogRecord) -> str:
        """Render one event."""
        words, facts = split_facts(str(record.msg), record.args)
        line: dict[str, Any] = {
            "time": _timestamp(record),
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "event": words,
            "request_id": request_id.get(),
            **_jsonable(facts),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        present = {key: value for key, value in line.items() if value is not None}
        return redact(orjson.dumps(present).decode(), self._known)


class TextFormatter(logging.Formatter):
    """Time, level, words, then the facts; coloured on a terminal."""

    def __init__(self, process: str, known: list[str], *, colour: bool = False) -> None:
        super().__init__()
        self._process = process
        self._known = known
        self._colour = colour

    def format(self, record: logging.LogRecord) -> str:
        """Render one event."""
        words, facts = split_facts(str(record.msg), record.args)
        if (current := request_id.get()) is not None:
            facts["request"] = current
        tail = "".join(f" {self._dim(key + '=')}{_shown(value)}" for key, value in facts.items())
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        level = self._paint(f"{record.levelname.lower():<7}", _COLOURS.get(record.levelname, "0"))
        line = f"{self._dim(clock)} {level} {self._process:<7} {' '.join(words.split())}{tail}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return redact(line, self._known)

    def _paint(self, text: str, code: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._colour else text

    def _dim(self, text: str) -> str:
        return self._paint(text, "2")


def _timestamp(record: logging.LogRecord) -> str:
    clock = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{clock}.{int(record.msecs):03d}Z"


def _jsonable(facts: Mapping[str, Any]) -> dict[str, Any]:
    plain = (str, int, float, bool, type(None))
    return {key: value if isinstance(value, plain) else str(value) for key, value in facts.items()}


def _shown(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return f'"{text}"' if " " in text else text.replace("\n", "\\n")
