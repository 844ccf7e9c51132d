"""Everything the service raises on purpose, and the HTTP status that each is answered with.

ServiceError
├── RequestError            the caller's fault
│   ├── InvalidEntries      422  `entries` is not the JSON Immich sends
│   ├── UnknownModel        422  no official model has this name and task; never replaced by another
│   ├── MissingPayload      400  neither an image nor a text, or not the one that a task needs
│   ├── MissingDependency   400  recognition was asked for without its detection
│   ├── InvalidImage        400  the bytes are not a picture we can decode
│   ├── ImageTooLarge       413  over the byte, pixel or side limit
│   └── UploadStalled       408  the client stopped sending, or sends too slowly
├── ModelError              this model cannot be served now
│   ├── ModelUnavailable    503  its files are not here and cannot be fetched
│   ├── DownloadFailed      503  network, disk or digest trouble while fetching
│   └── LoadFailed          500  the files are here but the engine rejects them
├── InferenceError          500  an engine failed on an accepted input
├── InvalidOutput           500  an output is not finite or of a wrong dimension
├── Condemned               500  it ended every worker that worked on it
├── OutOfMemory             503  no memory is left; the gateway asks another worker
├── TimedOut                503  no answer within the limit
├── Busy                    503  a place is taken for a moment; the gateway asks again
├── Overloaded              503  held as long as it could be held; try again later
└── ConfigError             a setting is unknown, malformed or cannot be honoured; stops the start

Both processes answer by `status_of`; nothing else decides a status of `/predict`. Before `/predict`
is looked at, a foreign `Origin` gets 403 and a wrong method 405.
"""

import errno
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType


class ServiceError(Exception):
    """Base of every deliberate failure."""


class RequestError(ServiceError):
    """The request can never succeed as sent."""


class InvalidEntries(RequestError):
    """`entries` is not the JSON Immich sends."""


class UnknownModel(RequestError):
    """No official model has this name and task. Never replaced by another one."""


class MissingPayload(RequestError):
    """Neither an image nor a text was sent, or not the one that a task needs."""


class MissingDependency(RequestError):
    """Recognition was asked for without its detection."""


class InvalidImage(RequestError):
    """The bytes are not a picture we can decode."""


class ImageTooLarge(RequestError):
    """The picture is over the byte, pixel or side limit."""


class UploadStalled(RequestError):
    """The client stopped sending in mid-upload, or sends too slowly."""


class ModelError(ServiceError):
    """The named model cannot be served now."""


class ModelUnavailable(ModelError):
    """The model's files are not here and cannot be fetched."""


class DownloadFailed(ModelError):
    """Network, disk or digest trouble while fetching weights."""


class LoadFailed(ModelError):
    """The files are present but the engine rejects them."""


class InferenceError(ServiceError):
    """An engine failed on an input that passed validation."""


class InvalidOutput(ServiceError):
    """An output is not finite, or a vector does not have the model's dimension."""


class Condemned(ServiceError):
    """The request was in flight at as many worker deaths as a request may be."""


class OutOfMemory(ServiceError):
    """The worker got no more memory. A new worker may have enough for the same request."""


class TimedOut(ServiceError):
    """The request made no progress within the limit."""


class Busy(ServiceError):
    """A place that one request takes at a time is taken, or no file can be opened; it passes."""


class Overloaded(ServiceError):
    """The request was held as long as it could be held. The caller should retry later."""


class ConfigError(ServiceError):
    """A setting is unknown, malformed or cannot be honoured. Stops the start."""


STATUS: Mapping[type[ServiceError], int] = MappingProxyType(
    {
        InvalidEntries: 422,
        UnknownModel: 422,
        MissingPayload: 400,
        MissingDependency: 400,
        InvalidImage: 400,
        ImageTooLarge: 413,
        UploadStalled: 408,
        ModelUnavailable: 503,
        DownloadFailed: 503,
        LoadFailed: 500,
        InferenceError: 500,
        InvalidOutput: 500,
        Condemned: 500,
        OutOfMemory: 503,
        TimedOut: 503,
        Busy: 503,
        Overloaded: 503,
    }
)
EXIT_NO_MEMORY = 70  # of a worker that has no memory left even to say so
CLIENT_GONE = 499  # nobody reads it; it keeps such requests apart in logs and metrics
# What may pass by itself. A network comes back: the gateway asks again for as long as it may hold.
RETRY_AFTER_S: Mapping[type[ServiceError], int] = MappingProxyType(
    {DownloadFailed: 5, OutOfMemory: 5, Busy: 1, Overloaded: 30}
)


def status_of(exc: Exception) -> int:
    """The status that a failure is answered with; 500 for what nobody raised on purpose."""
    return STATUS.get(type(exc), 500) if isinstance(exc, ServiceError) else 500


_NO_FILES = frozenset({errno.EMFILE, errno.ENFILE})
# In the words of ONNX Runtime, which keeps no number, and of Pillow, whose OSError has none.
_NO_FILES_TOLD = re.compile(
    rf"system error number ({errno.EMFILE}|{errno.ENFILE})\b|Too many open files"
)
_NO_MEMORY_TOLD = re.compile(r"bad_alloc|bad allocation|out of memory error")


def what_ran_out(exc: BaseException) -> OutOfMemory | Busy | None:
    """The failure that says what the machine had no more of, if that is why `exc` was raised.

    No picture, model or engine is to blame then, whatever `exc` or what it was made from says.
    """
    cause: BaseException | None = exc
    while cause is not None:
        if isinstance(cause, OutOfMemory | Busy):
            return cause
        number = cause.errno if isinstance(cause, OSError) else None
        words = str(cause)
        if number in _NO_FILES or _NO_FILES_TOLD.search(words):
            return Busy(f"Too many open files: {words}")
        is_short = isinstance(cause, MemoryError) or number == errno.ENOMEM
        if is_short or _NO_MEMORY_TOLD.search(words):
            return OutOfMemory(f"out of memory: {words or type(cause).__name__}")
        cause = cause.__cause__
    return None


@contextmanager
def naming_what_ran_out() -> Iterator[None]:
    """Raise what the machine had no more of in place of whatever that led to."""
    try:
        yield
    except Exception as exc:
        if (named := what_ran_out(exc)) is None or named is exc:
            raise
        raise named from exc
