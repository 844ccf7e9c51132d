"""Keep a Mac awake while there is work, and only then.

A child `caffeinate` holds the assertion instead of IOKit in our process: it needs no library in the
gateway, it names itself in `pmset -g assertions`, and with `-w` the system frees it with us,
however we end. Elsewhere there is no such program, and nothing is done.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from typing import Protocol

# Immich sends the next photo within this time while an import lasts.
LINGER_S = 60.0


class Assertion(Protocol):
    """A held wake assertion."""

    def terminate(self) -> None:
        """Let the machine sleep again."""
        ...

    def wait(self) -> object:
        """Wait until it is gone."""
        ...


class KeepAwake:
    """Counts work; holds an assertion from the first piece until `linger_s` after the last."""

    def __init__(
        self,
        assert_awake: Callable[[], Assertion],
        *,
        linger_s: float = LINGER_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._assert_awake = assert_awake
        self._linger_s = linger_s
        self._clock = clock
        self._working = 0
        self._ended_s = 0.0
        self._assertion: Assertion | None = None

    def begin(self) -> None:
        """A piece of work has come."""
        self._working += 1
        if self._assertion is None:
            self._assertion = self._assert_awake()

    def end(self) -> None:
        """A piece of work is done."""
        self._working -= 1
        self._ended_s = self._clock()

    def tick(self) -> None:
        """Let go when there has been no work for a while. Call this every few seconds."""
        idle_s = self._clock() - self._ended_s
        if self._working == 0 and self._assertion is not None and idle_s >= self._linger_s:
            self.close()

    def close(self) -> None:
        """Let go now."""
        if self._assertion is not None:
            self._assertion.terminate()
            self._assertion.wait()
            self._assertion = None


def make_keep_awake() -> KeepAwake | None:
    """One for this machine; None where nothing can keep it awake."""
    program = shutil.which("caffeinate")
    if program is None:
        return None
    command = [program, "-i", "-w", str(os.getpid())]
    return KeepAwake(lambda: subprocess.Popen(command, stdin=subprocess.DEVNULL))
