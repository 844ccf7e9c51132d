"""What the guard remembers on disk: the queues that we paused, that we run, what is missing.

One document in the state folder, owned by one process. It holds no guess about anybody's intent: a
queue that is not in it was not paused by us.
"""

import fcntl
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import IO, Any

from immich_ml_metal.immich.repairs import Repair
from immich_ml_metal.state import StateFolder, StateUnusable
from immich_ml_metal.types import QUEUES

DOCUMENT = "guard"
VERSION = 1
STOPPED = "the service is stopped"  # the reason of a pause that the next start ends


@dataclass(frozen=True, slots=True)
class Pause:
    """Why and since when (UTC) we keep one queue paused."""

    reason: str
    since: str


@dataclass(slots=True)
class Records:
    """The document; change its fields, then `save`.

    Attributes:
        paused: the queues that we paused, by task.
        running_since: the run marker: set while we run, None after a planned end.
        unplanned_end: when the last start found that the run before had not ended as planned.
        repairs: missing runs to ask for and what came of the last ones, by task.
        duplicates: smart search got missing results; Immich is to look for duplicates after it.
    """

    paused: dict[str, Pause] = field(default_factory=dict)
    running_since: str | None = None
    unplanned_end: str | None = None
    repairs: dict[str, Repair] = field(default_factory=dict)
    duplicates: bool = False

    def __post_init__(self) -> None:
        if unknown := (self.paused.keys() | self.repairs.keys()) - QUEUES.keys():
            raise TypeError(f"there is no task {min(unknown)!r}")

    @classmethod
    def load(cls, folder: StateFolder) -> "Records":
        """Read them; empty where there are none yet.

        Raises:
            StateUnusable: unreadable, damaged, or written by a newer release.
        """
        found = folder.read(DOCUMENT, VERSION) or {}
        try:
            return cls(
                paused={task: Pause(**pause) for task, pause in found.get("paused", {}).items()},
                running_since=found.get("running_since"),
                unplanned_end=found.get("unplanned_end"),
                repairs={task: Repair(**one) for task, one in found.get("repairs", {}).items()},
                duplicates=bool(found.get("duplicates")),
            )
        except (TypeError, AttributeError) as exc:
            path = folder.path / f"{DOCUMENT}.json"
            raise StateUnusable(f"{path} is damaged ({exc}); delete it to start afresh") from exc

    def repair(self, task: str) -> Repair:
        """The repair of one task, made at its first use."""
        return self.repairs.setdefault(task, Repair())

    def document(self) -> dict[str, Any]:
        """Everything as JSON holds it."""
        return asdict(self)


def claim(folder: StateFolder) -> IO[bytes]:
    """Own the document until the file that is returned is closed, or the process ends.

    Raises:
        StateUnusable: another process owns it, or the folder cannot be written.
    """
    lock = folder.open_lock(DOCUMENT)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as exc:
        lock.close()
        raise StateUnusable(f"another process of this service holds {lock.name}") from exc
    return lock


def now_utc() -> str:
    """The time as it stands in the records."""
    return datetime.now(UTC).isoformat(timespec="seconds")
