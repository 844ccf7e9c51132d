"""The process in which one candidate is measured: `python -m immich_ml_metal.qualification.child`.

It takes an order on standard input and tells on standard output what it does and what it found. It
may abort or hang in any library: its parent makes a verdict of that too.
"""

import asyncio
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from math import ceil
from typing import TYPE_CHECKING, TextIO

from immich_ml_metal.qualification.order import CHECK, Order, step_line, verdict_line
from immich_ml_metal.qualification.verdict import Outcome, Verdict

if TYPE_CHECKING:
    from immich_ml_metal.backends.makers import Maker

_STDIN = 0
_NICENESS = 10
_ALARM_AFTER_S = 5  # after the parent's own limit


def main(makers: "Mapping[str, Maker] | None" = None) -> None:
    """Run one order. `makers` are the engines by name; the real ones when None."""
    out = _take_stdout()
    order = Order.load(read_order())
    # The kernel's own alarm ends even a process whose interpreter is stuck in a library.
    signal.alarm(ceil(order.limit_s) + _ALARM_AFTER_S)
    if order.depth == CHECK:
        be_nice()
    verdict = _run(order, makers, lambda step: print(step_line(step), file=out, flush=True))
    print(verdict_line(verdict), file=out, flush=True)
    os._exit(0)  # what a library does at exit is no matter of its numbers


def _run(order: Order, makers: "Mapping[str, Maker] | None", say: Callable[[str], None]) -> Verdict:
    from immich_ml_metal.backends.makers import MAKERS
    from immich_ml_metal.qualification.probe import probe

    try:
        return asyncio.run(probe(order, makers or MAKERS, say))
    except Exception as exc:  # noqa: BLE001 - whatever it is, it is what the engine does here
        return Verdict(Outcome.FAILED, f"{type(exc).__name__}: {exc}")


def _take_stdout() -> TextIO:
    """Keep standard output for the report: libraries that print there go to standard error."""
    kept = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return kept


def read_order() -> bytes:
    """The line on standard input, which stays open while the parent lives: its end is ours."""
    line = bytearray()
    while not line.endswith(b"\n"):
        if not (chunk := os.read(_STDIN, 65_536)):
            sys.exit("the parent went away before it gave its order")
        line += chunk
    threading.Thread(target=_end_with_parent, daemon=True).start()
    return bytes(line)


def be_nice() -> None:
    """A check runs beside an import."""
    with contextlib.suppress(OSError):
        os.nice(_NICENESS)


def _end_with_parent() -> None:
    while os.read(_STDIN, 65_536):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
