"""Has candidates measured, each in a child process of its own with a time limit.

An abort, a hang, an exception and a wrong number are all the same to the caller: a verdict.
"""

import asyncio
import contextlib
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Sequence

from immich_ml_metal.qualification.order import Order, read_report
from immich_ml_metal.qualification.verdict import Outcome, Verdict

COMMAND = (sys.executable, "-m", "immich_ml_metal.qualification.child")
_KEPT_BYTES = 65_536
# After the end of a probe: what it left behind in a session of its own may hold the pipes for ever.
_REST_S = 2.0
_TICK_S = 0.05
_LAST_WORDS = 300  # characters of standard error that a reason quotes


async def measure(order: Order, command: Sequence[str] = COMMAND) -> Verdict:
    """Run one probe to its end, or to the end of its patience."""
    try:
        process = await asyncio.create_subprocess_exec(
            *command, stdin=PIPE, stdout=PIPE, stderr=PIPE, start_new_session=True
        )
    except OSError as exc:
        return Verdict(Outcome.UNAVAILABLE, f"no process to be had: {exc.strerror}")
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    out, words = bytearray(), bytearray()
    readers = [
        asyncio.ensure_future(_read(process.stdout, out)),
        asyncio.ensure_future(_read(process.stderr, words)),
    ]
    hung_s = None
    try:
        process.stdin.write(order.dump())  # and it stays open: its end tells the child to go
        await asyncio.wait_for(_end_of(process), order.limit_s)
    except TimeoutError:
        hung_s = order.limit_s
    finally:
        _kill(process)
        await asyncio.shield(_end_of(process))
        await _let_go(process, readers)
    return _verdict(process.returncode or 0, bytes(out), bytes(words), hung_s)


async def _let_go(process: Process, readers: Sequence[asyncio.Future[None]]) -> None:
    """Hear what was said to the end, and close the pipes even where others hold them."""
    await asyncio.wait(readers, timeout=_REST_S)
    for reader in readers:
        reader.cancel()
    process._transport.close()  # type: ignore[attr-defined]


async def _end_of(process: Process) -> None:
    """Wait for the process alone: `wait` also waits for pipes that a child of it may hold."""
    while process.returncode is None:  # noqa: ASYNC110 - asyncio tells it in no other way
        await asyncio.sleep(_TICK_S)


async def _read(stream: asyncio.StreamReader, into: bytearray) -> None:
    """Keep the end of what a probe says: the verdict is there; a library may say without end."""
    while chunk := await stream.read(_KEPT_BYTES):
        into += chunk
        del into[:-_KEPT_BYTES]


def _verdict(status: int, out: bytes, words: bytes, hung_s: float | None) -> Verdict:
    report = read_report(out)
    if report.verdict is not None:
        return report.verdict
    if hung_s is not None:
        return Verdict(Outcome.HUNG, f"no end within {hung_s:g} s, while {report.step}")
    how = f"exit status {status}"
    if status < 0:
        with contextlib.suppress(ValueError):
            how = signal.Signals(-status).name
    lines = [line for line in words.decode(errors="replace").splitlines() if line.strip()]
    said = f": {lines[-1][-_LAST_WORDS:]}" if lines else ""
    return Verdict(Outcome.CRASHED, f"{how} while {report.step}{said}")


def _kill(process: Process) -> None:
    """End the child and all it started, which may outlive it: its group keeps its id meanwhile."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
