"""Exit codes, the same for every command; documented in `docs/operate.md`."""

from enum import IntEnum


class Exit(IntEnum):
    """How a command ended."""

    OK = 0
    FINDING = 1  # it ran, and the answer is no: a failed check, a difference, a stopped service
    USAGE = 2  # a wrong option or setting
    UNREACHABLE = 3  # the other side could not be asked
    UNSAFE = 4  # parity: do not mix
