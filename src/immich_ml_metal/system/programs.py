"""Run a program and read what it says: the seam between us and the operating system's tools."""

import subprocess
from dataclasses import dataclass
from typing import Protocol

TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True)
class Completed:
    """How a program ended; `code` is 127 when there is no such program."""

    code: int
    out: str = ""
    err: str = ""


class RunProgram(Protocol):
    """Runs a program to its end."""

    def __call__(self, *args: str) -> Completed:
        """Run `args[0]` with the other arguments; never raises for how the program ends."""
        ...


def run_program(*args: str) -> Completed:
    """The real thing."""
    try:
        done = subprocess.run(
            args, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, errors="replace"
        )
    except FileNotFoundError:
        return Completed(127, err=f"{args[0]}: not found")
    except (PermissionError, subprocess.TimeoutExpired) as exc:
        return Completed(126, err=f"{args[0]}: {exc}")
    return Completed(done.returncode, done.stdout, done.stderr)
