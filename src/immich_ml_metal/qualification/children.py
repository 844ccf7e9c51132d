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
_LAST_WORDS = 300  # characters of standard error that a reason quotes


async def measure(order: Order, command: Sequence[str] = COMMAND) -> Verdict:
    """Run one probe to its end, or to the end of its patience."""
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=PIPE,
            stdout=PIPE,
            stderr=PIPE,
            start_new_session=True,
        )
    except OSError as exc:
        return Verdict(Outcome.UNAVAILABLE, f"no process to be had: {exc.strerror}")
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    out = asyncio.ensure_future(process.stdout.read())
    words = asyncio.ensure_future(process.stderr.read())
    hung_s = None
    try:
        process.stdin.write(order.dump())  # and it stays open: its end tells the child to go
        await asyncio.wait_for(process.wait(), order.limit_s)
    except TimeoutError:
        hung_s = order.limit_s
    finally:
        _kill(process)
        await asyncio.shield(process.wait())
    return _verdict(process.returncode or 0, await out, await words, hung_s)


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
    """End the child and all it started: until it is reaped its group's id is its own."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
