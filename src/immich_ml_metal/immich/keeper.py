"""Pauses and resumes Immich's queues so that none stays paused for ever, however we end.

A pause is written down before Immich is asked for it, and forgotten only after Immich has resumed.
"""

import asyncio
from collections.abc import Callable, Collection
from functools import partial
from typing import IO, TypeVar

from immich_ml_metal.immich.api import ImmichApi, ImmichError, QueueCounts, ServerSettings
from immich_ml_metal.immich.aside import aside
from immich_ml_metal.immich.records import (
    DOCUMENT,
    VERSION,
    Pause,
    Records,
    claim,
    now_utc,
)
from immich_ml_metal.state import StateFolder

T = TypeVar("T")


class Keeper:
    """Immich's queues and our records of them. Event loop only; blocking work is done beside it."""

    def __init__(self, immich: ImmichApi, folder: StateFolder) -> None:
        self.records = Records()
        self.immich = immich
        self._folder = folder
        self._lock: IO[bytes] | None = None
        self._saving = asyncio.Lock()
        self._unsure: set[str] = set()

    @property
    def is_open(self) -> bool:
        """Whether the records are ours."""
        return self._lock is not None

    async def open(self) -> None:
        """Own and read the records.

        Raises:
            StateUnusable: another process owns them, or they cannot be read or written.
        """
        lock = await aside(partial(claim, self._folder))
        try:
            self.records = await aside(partial(Records.load, self._folder))
        except BaseException:
            lock.close()
            raise
        self._lock = lock

    async def save(self) -> None:
        """Write the records as they are now.

        Raises:
            StateUnusable: the folder cannot be written.
        """
        async with self._saving:
            document = self.records.document()
            await aside(partial(self._folder.write, DOCUMENT, VERSION, document))

    def close(self) -> None:
        """Let another process own the records."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    async def look(self, timeout_s: float) -> dict[str, QueueCounts]:
        """Immich's queues now.

        Raises:
            ImmichError: it cannot be asked.
        """
        return await aside(partial(self.immich.queues, timeout_s))

    async def settings(self, timeout_s: float) -> ServerSettings:
        """Immich's settings now.

        Raises:
            ImmichError: it cannot be asked.
        """
        return await aside(partial(self.immich.settings, timeout_s))

    async def pause(
        self, tasks: Collection[str], reason: str, timeout_s: float
    ) -> dict[str, ImmichError]:
        """Pause running queues, side by side; what Immich said against it, by task.

        Raises:
            StateUnusable: it cannot be written down, so nothing was paused.
        """
        since = now_utc()
        self.records.paused |= {task: Pause(reason, since) for task in tasks}
        try:
            await self.save()
        except BaseException:
            for task in tasks:
                self.records.paused.pop(task, None)
            raise
        failed = await self._each(tasks, lambda task: self.immich.pause(task, timeout_s))
        self._unsure |= failed.keys()  # it may have been heard all the same
        return failed

    async def resume(self, tasks: Collection[str], timeout_s: float) -> dict[str, ImmichError]:
        """Resume queues that we paused; what Immich said against it, by task.

        Raises:
            StateUnusable: they go on, but are still written down; the next look forgets them.
        """
        failed = await self._each(tasks, lambda task: self.immich.resume(task, timeout_s))
        for task in set(tasks) - failed.keys():
            self.records.paused.pop(task, None)
        await self.save()
        return failed

    def forget_running(self, queues: dict[str, QueueCounts]) -> dict[str, Pause]:
        """Forget the pauses that are over; those of them that somebody else has ended.

        The caller saves.
        """
        over = {
            task: pause
            for task, pause in self.records.paused.items()
            if task in queues and not queues[task].is_paused
        }
        for task in over:
            del self.records.paused[task]
        ended = {task: pause for task, pause in over.items() if task not in self._unsure}
        self._unsure &= self.records.paused.keys()
        return ended

    @staticmethod
    async def _each(tasks: Collection[str], call: Callable[[str], None]) -> dict[str, ImmichError]:
        answers = await asyncio.gather(
            *(aside(partial(call, task)) for task in tasks), return_exceptions=True
        )
        failed = {}
        for task, answer in zip(tasks, answers, strict=True):
            if isinstance(answer, ImmichError):
                failed[task] = answer
            elif answer is not None:
                raise answer
        return failed
