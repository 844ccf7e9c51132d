"""Everything the service raises on purpose.

ServiceError
├── RequestError            the caller's fault
│   ├── InvalidEntries      `entries` is not the JSON Immich sends
│   ├── UnknownModel        no official model has this name and task; never replaced by another
│   ├── MissingPayload      neither an image nor a text, or not the one that a task needs
│   ├── MissingDependency   recognition was asked for without its detection
│   ├── InvalidImage        the bytes are not a picture we can decode
│   └── ImageTooLarge       over the byte, pixel or side limit
├── ModelError              this model cannot be served now
│   ├── ModelUnavailable    its files are not here and cannot be fetched (offline, no such file)
│   ├── DownloadFailed      network, disk or digest trouble while fetching
│   └── LoadFailed          the files are here but the engine rejects them
├── InferenceError          an engine failed on an accepted input
├── InvalidOutput           an output is not finite or a vector has the wrong dimension
├── TimedOut                no answer within the limit
├── Overloaded              held as long as it could be held; try again later
└── ConfigError             a setting is unknown, malformed or cannot be honoured; stops the start

Each leaf but ConfigError has exactly one HTTP status, in `server.STATUS`.
"""


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


class TimedOut(ServiceError):
    """The request made no progress within the limit."""


class Overloaded(ServiceError):
    """The request was held as long as it could be held. The caller should retry later."""


class ConfigError(ServiceError):
    """A setting is unknown, malformed or cannot be honoured. Stops the start."""
