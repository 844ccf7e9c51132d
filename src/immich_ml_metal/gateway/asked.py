"""What a `/predict` asks for, told from how its body begins, without parsing it.

The gateway keeps bodies unread; Immich sends `entries` first, and short. Names found too often cost
an idle missing run, never a wrong answer.
"""

import re
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from immich_ml_metal.types import Task

TASKS = tuple(Task)
_HEAD_BYTES = 4096
_MODEL = re.compile(rb'"modelName"\s*:\s*"([^"\\]{1,200})"')


@dataclass(frozen=True, slots=True)
class Asked:
    """What one request wants.

    Attributes:
        tasks: Immich's names of the tasks, in the order of `TASKS`.
        model: the first model named; empty when none was found.
        is_search: somebody waits for it at a screen: it is no job of a queue.
    """

    tasks: tuple[str, ...] = ()
    model: str = ""
    is_search: bool = False

    @property
    def job(self) -> tuple[str, str] | None:
        """Task and model, where it is one of Immich's jobs: one task, by one model."""
        if len(self.tasks) != 1 or not self.model or self.is_search:
            return None
        return self.tasks[0], self.model


def read_asked(head: bytes) -> Asked:
    """What a body that begins with `head` asks for."""
    tasks = tuple(task for task in TASKS if f'"{task}"'.encode() in head)
    model = _MODEL.search(head)
    name = model[1].decode("utf-8", "replace") if model else ""
    return Asked(tasks, name, is_search=b'"textual"' in head)


class Upload:
    """Passes an upload through and remembers how it begins."""

    def __init__(self, receive: Callable[[], Awaitable[MutableMapping[str, Any]]]) -> None:
        self.head = b""
        self._receive = receive

    @property
    def asked(self) -> Asked:
        """What it asks for, as far as it was read."""
        return read_asked(self.head)

    async def __call__(self) -> MutableMapping[str, Any]:
        """The next message of the server."""
        message = await self._receive()
        self.head += message.get("body", b"")[: _HEAD_BYTES - len(self.head)]
        return message
