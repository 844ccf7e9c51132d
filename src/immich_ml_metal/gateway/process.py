"""The worker as a child process: start it, know when it is ready and when it is gone, end it."""

import asyncio
import contextlib
import os
import signal
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Sequence
from pathlib import Path

from immich_ml_metal.errors import EXIT_NO_MEMORY
from immich_ml_metal.gateway import client as worker_client
from immich_ml_metal.gateway.client import WorkerLost
from immich_ml_metal.system.switches import worker_environment

OUT_OF_MEMORY = "out of memory"  # why a worker ended, in the log and on `/health`
_READY_POLL_S = 0.05


class WorkerProcess:
    """One child, in a session of its own: a Ctrl-C in the terminal reaches only the gateway.

    Its standard input stays open for as long as this process lives; its end tells the child to go.
    """

    def __init__(self, process: Process, socket: Path) -> None:
        self.socket = socket
        self.pid = process.pid
        self.started_s = time.monotonic()
        self._process = process
        self.gone = asyncio.ensure_future(process.wait())

    @classmethod
    async def start(
        cls, command: Sequence[str], settings_json: str, socket: Path
    ) -> "WorkerProcess":
        """Run `command SOCKET` and send it the settings.

        Raises:
            OSError: the command cannot be run.
        """
        process = await asyncio.create_subprocess_exec(
            *command,
            str(socket),
            stdin=PIPE,
            start_new_session=True,
            env=worker_environment(),
        )
        assert process.stdin is not None
        # No drain: a pipe takes 64 KB at once, and a child that died shows by its exit status.
        process.stdin.write(settings_json.encode() + b"\n")
        return cls(process, socket)

    async def ready(self) -> None:
        """Return once the worker answers."""
        while True:
            with contextlib.suppress(WorkerLost):
                answer = await worker_client.get(self.socket, "/ping", timeout_s=5)
                if answer.status == 200:
                    return
            await asyncio.sleep(_READY_POLL_S)

    async def stop(self, limit_s: float) -> int:
        """Ask the child to end, insist after `limit_s`, and return its exit status."""
        self._signal(signal.SIGTERM)
        await asyncio.wait({self.gone}, timeout=limit_s)
        return await self.kill()

    async def kill(self) -> int:
        """End the child and its helpers now, and return its exit status."""
        self._signal(signal.SIGKILL)
        status = await asyncio.shield(self.gone)
        if self._process.stdin is not None:
            self._process.stdin.close()
        self.socket.unlink(missing_ok=True)
        return status

    def _signal(self, number: signal.Signals) -> None:
        if not self.gone.done():  # until it is reaped, the group's id cannot be anybody else's
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)


def describe(status: int) -> str:
    """Name an exit status: `SIGABRT`, `exit status 2`, or what ours stand for."""
    if status == EXIT_NO_MEMORY:
        return OUT_OF_MEMORY
    if status >= 0:
        return f"exit status {status}"
    with contextlib.suppress(ValueError):
        return signal.Signals(-status).name
    return f"signal {-status}"
