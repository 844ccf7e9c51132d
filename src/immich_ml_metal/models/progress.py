"""What is being downloaded now and how far it is: for `/health`, the log and the command line.

Knows nothing about where bytes come from.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum

from immich_ml_metal.errors import DownloadFailed
from immich_ml_metal.setting_kinds import format_bytes
from immich_ml_metal.types import ModelKey

logger = logging.getLogger(__name__)

LOG_EVERY_S = 10.0  # often enough to see life, seldom enough to keep the log short


class Phase(StrEnum):
    """What a download is doing."""

    WAITING = "waiting"  # another thread or process fetches the same files
    STARTING = "starting"  # asking for the list of files
    DOWNLOADING = "downloading"
    RETRYING = "retrying"


@dataclass(frozen=True, slots=True)
class DownloadProgress:
    """One download at one moment.

    Attributes:
        total_bytes: 0 until the list of files is known.
        rate_bytes_s: mean since the start, bytes that were there before not counted.
        note: the last trouble, while retrying.
    """

    key: ModelKey
    phase: Phase
    done_bytes: int
    total_bytes: int
    elapsed_s: float
    rate_bytes_s: float
    note: str | None = None

    @property
    def remaining_s(self) -> float | None:
        """Estimated seconds left; None while nothing is known."""
        if self.rate_bytes_s <= 0 or not self.total_bytes:
            return None
        return (self.total_bytes - self.done_bytes) / self.rate_bytes_s

    def describe(self) -> dict[str, str | float | None]:
        """As JSON can hold it, for `/health` and the page."""
        return {
            "model": str(self.key),
            "phase": self.phase,
            "done_bytes": self.done_bytes,
            "total_bytes": self.total_bytes,
            "rate_bytes_s": round(self.rate_bytes_s),
            "remaining_s": None if self.remaining_s is None else round(self.remaining_s, 1),
            "note": self.note,
        }


Listener = Callable[[DownloadProgress], None]


class Tracker:
    """The progress of one download; several threads may advance it."""

    def __init__(
        self,
        key: ModelKey,
        listener: Listener | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.key = key
        self._clock = clock
        self._listener = listener
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._phase = Phase.STARTING
        self._total = self._done = self._inherited = 0
        self._note: str | None = None
        self._started = self._logged = self._clock()

    @property
    def received_bytes(self) -> int:
        """Bytes that came over the network and were kept so far."""
        with self._lock:
            return max(0, self._done - self._inherited)

    def wait(self) -> None:
        """Say, once, that another download of the same files is being waited for.

        Raises:
            DownloadFailed: it was stopped meanwhile.
        """
        self.raise_if_stopped()
        if self._phase is not Phase.WAITING:
            self._set(Phase.WAITING)
            logger.info("waiting for another download of %s", self.key)

    def begin(self, total_bytes: int, present_bytes: int) -> None:
        """Start counting: `present_bytes` of `total_bytes` are on disk from an earlier attempt."""
        with self._lock:
            self._total, self._done, self._inherited = total_bytes, present_bytes, present_bytes
            self._started = self._logged = self._clock()
        self._set(Phase.DOWNLOADING)

    def advance(self, size_bytes: int) -> None:
        """Count bytes received; negative when bytes had to be thrown away."""
        with self._lock:
            self._done += size_bytes
            self._phase, self._note = Phase.DOWNLOADING, None
            due = self._clock() - self._logged >= LOG_EVERY_S
            if due:
                self._logged = self._clock()
        self._tell()
        if due:
            self._log()

    def retry(self, reason: str, wait_s: float) -> None:
        """Say why the download pauses, and pause.

        Raises:
            DownloadFailed: it was stopped meanwhile.
        """
        with self._lock:
            self._note = reason
        self._set(Phase.RETRYING)
        logger.warning("download of %s: %s; trying again in %.1f s", self.key, reason, wait_s)
        self._stopped.wait(wait_s)
        self.raise_if_stopped()

    def stop(self) -> None:
        """Ask the download to end soon."""
        self._stopped.set()

    def raise_if_stopped(self) -> None:
        """End a download that was asked to stop.

        Raises:
            DownloadFailed: it was.
        """
        if self._stopped.is_set():
            raise DownloadFailed(f"download of {self.key} stopped; it goes on from there next time")

    def snapshot(self) -> DownloadProgress:
        """The state now."""
        with self._lock:
            elapsed_s = self._clock() - self._started
            rate = max(0, self._done - self._inherited) / elapsed_s if elapsed_s > 0 else 0.0
            return DownloadProgress(
                self.key, self._phase, self._done, self._total, elapsed_s, rate, self._note
            )

    def _set(self, phase: Phase) -> None:
        with self._lock:
            self._phase = phase
        self._tell()

    def _tell(self) -> None:
        if self._listener is not None:
            self._listener(self.snapshot())

    def _log(self) -> None:
        now = self.snapshot()
        percent = 100 * now.done_bytes / now.total_bytes if now.total_bytes else 0
        logger.info(
            "downloading %s: %.0f %% of %s at %s/s",
            self.key,
            percent,
            format_bytes(now.total_bytes),
            format_bytes(now.rate_bytes_s),
        )


class Downloads:
    """The running downloads of one store."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._trackers: list[Tracker] = []
        self._closed = False

    @contextmanager
    def track(self, key: ModelKey, listener: Listener | None = None) -> Iterator[Tracker]:
        """Show a download for as long as the block runs."""
        tracker = Tracker(key, listener)
        with self._lock:
            self._trackers.append(tracker)
            if self._closed:
                tracker.stop()
        try:
            yield tracker
        finally:
            with self._lock:
                self._trackers.remove(tracker)

    def close(self) -> None:
        """Ask every download, running or yet to come, to end."""
        with self._lock:
            self._closed = True
            for tracker in self._trackers:
                tracker.stop()

    def snapshot(self) -> tuple[DownloadProgress, ...]:
        """Every running download, oldest first."""
        with self._lock:
            trackers = list(self._trackers)
        return tuple(tracker.snapshot() for tracker in trackers)
