"""What the machine says: processor time and memory of a service, and whether others were busy."""

import contextlib
import os
import time
from collections.abc import Iterable, Iterator
from urllib.parse import urlsplit

import psutil

from immich_ml_metal.system.footprint import private_bytes
from immich_ml_metal.threads import core_count

TOO_BUSY = 0.1  # of all cores, used by others: ratios of that size are noise
_LOCAL = frozenset({"localhost", "127.0.0.1", "::1"})
_IDLE = ("idle", "iowait", "guest", "guest_nice")  # guest time is counted as user time already


class Processes:
    """A service's processes on this machine; none where it runs elsewhere."""

    def __init__(self, pid: int | None) -> None:
        self._pid = pid

    @classmethod
    def behind(cls, url: str) -> "Processes":
        """Those that listen at `url`, when it is here and they are ours to look at."""
        address = urlsplit(url)
        if address.hostname not in _LOCAL:
            return cls(None)
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                for connection in process.net_connections("tcp"):
                    if connection.status == "LISTEN" and connection.laddr.port == address.port:
                        return cls(process.pid)
        return cls(None)

    def cpu_s(self) -> float | None:
        """Processor seconds so far; None when unknown."""
        return None if self._pid is None else sum(self.cpu_s_by_pid().values())

    def cpu_s_by_pid(self) -> dict[int, float]:
        """Processor seconds so far of each process by its number; empty when unknown."""
        found: dict[int, float] = {}
        for process in self._members() if self._pid is not None else ():
            with contextlib.suppress(psutil.Error):  # it ended meanwhile
                found[process.pid] = sum(process.cpu_times()[:2])
        return found

    def private_bytes(self) -> int | None:
        """Memory that is theirs alone; None when unknown."""
        if self._pid is None:
            return None
        return sum(private_bytes(process.pid) or 0 for process in self._members())

    def resident_bytes(self) -> int | None:
        """Memory with everything mapped; None when unknown."""
        if self._pid is None:
            return None
        return sum(int(process.memory_info().rss) for process in self._members())

    def _members(self) -> Iterator[psutil.Process]:
        with contextlib.suppress(psutil.Error):
            first = psutil.Process(self._pid)
            for process in (first, *first.children(recursive=True)):
                with contextlib.suppress(psutil.Error):
                    process.cpu_times()
                    yield process


class OtherWork:
    """The share of all cores that went to neither a service nor this command, since the start."""

    def __init__(self, services: Iterable[Processes]) -> None:
        self._known = (Processes(os.getpid()), *services)
        self._started_s = time.perf_counter()
        self._others_s = self._measure()

    def share(self) -> float:
        """0..1; near 0 on a quiet machine."""
        elapsed_s = (time.perf_counter() - self._started_s) * core_count()
        return max(0.0, self._measure() - self._others_s) / max(elapsed_s, 1e-9)

    def _measure(self) -> float:
        times = psutil.cpu_times()._asdict()
        busy_s = sum(seconds for name, seconds in times.items() if name not in _IDLE)
        # by number: a service that this command started is among its children too
        known_s = {pid: s for known in self._known for pid, s in known.cpu_s_by_pid().items()}
        return float(busy_s) - sum(known_s.values())
