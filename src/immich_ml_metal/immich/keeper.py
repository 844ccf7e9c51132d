"""Pauses and resumes Immich's queues so that none stays paused for ever, however we end.

A pause is written down before Immich is asked for it, and forgotten only after Immich has resumed.
Whoever is cancelled leaves his command on its way: it is waited for, else Immich could hear it
after, and against, the next one.
"""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Collection
from functools import partial
from typing import IO, Any, TypeVar

from immich_ml_metal.immich.api import ImmichApi, ImmichError, QueueCounts, ServerSettings
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
        self._saving = threading.Lock()
        self._last_asked = self._last_save = 0
        self._saved: dict[str, Any] = {}
        self._unsure: set[str] = set()  # pauses that Immich may have heard of, or not
        self._on_their_way: set[asyncio.Future[Any]] = set()

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
        if self.records.running_since is not None:  # the end may have come before Immich was asked
            self._unsure |= self.records.paused.keys()

    async def save(self) -> None:
        """Write the records as they are now, where that is not what was written last.

        Raises:
            StateUnusable: the folder cannot be written.
        """
        document = self.records.document()
        if document != self._saved or self._last_save != self._last_asked:
            self._last_asked += 1
            await aside(partial(self._write, document, self._last_asked))

    def _write(self, document: dict[str, Any], number: int) -> None:
        with self._saving:  # a save whose caller was cancelled must not come after a later one
            if number > self._last_save:
                self._folder.write(DOCUMENT, VERSION, document)
                self._last_save, self._saved = number, document

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
        since, before = now_utc(), self.records.paused
        self.records.paused = before | {task: Pause(reason, since) for task in tasks}
        try:
            await self.save()
        except BaseException:
            self.records.paused = before
            raise
        failed = await self._each(tasks, partial(self.immich.pause, timeout_s=timeout_s))
        self._unsure |= failed.keys()  # it may have been heard all the same
        return failed

    async def resume(self, tasks: Collection[str], timeout_s: float) -> dict[str, ImmichError]:
        """Resume queues that we paused; what Immich said against it, by task.

        Raises:
            StateUnusable: they go on, but are still written down; the next look forgets them.
        """
        failed = await self.try_resume(tasks, timeout_s)
        for task in set(tasks) - failed.keys():
            self.records.paused.pop(task, None)
        await self.save()
        return failed

    async def try_resume(self, tasks: Collection[str], timeout_s: float) -> dict[str, ImmichError]:
        """Ask Immich to resume, and leave the records as they are; as `resume`."""
        return await self._each(tasks, partial(self.immich.resume, timeout_s=timeout_s))

    async def arrived(self) -> None:
        """Return once every command of a cancelled caller has been answered."""
        while self._on_their_way:
            await asyncio.wait(self._on_their_way)

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

    async def _each(
        self, tasks: Collection[str], call: Callable[[str], None]
    ) -> dict[str, ImmichError]:
        calls = asyncio.gather(
            *(aside(partial(call, task)) for task in tasks), return_exceptions=True
        )
        self._on_their_way.add(calls)
        calls.add_done_callback(self._on_their_way.discard)
        answers = await asyncio.shield(calls)
        failed = {}
        for task, answer in zip(tasks, answers, strict=True):
            if isinstance(answer, ImmichError):
                failed[task] = answer
            elif answer is not None:
                raise answer
        return failed


async def aside(call: Callable[[], T]) -> T:
    """What a blocking `call` returns or raises, on a thread that keeps nobody from ending.

    The loop's own pool would not do: its threads are joined at exit, and a name server that does
    not answer holds one for longer than a stop may take. A caller that is cancelled leaves the call
    running to its end.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def settle(value: T | None, failure: BaseException | None) -> None:
        if done.done():
            return
        if failure is not None:
            done.set_exception(failure)
        else:
            done.set_result(value)  # type: ignore[arg-type]  # None only where T is None

    def work() -> None:
        value, failure = None, None
        try:
            value = call()
        except Exception as exc:  # noqa: BLE001 - raised again where it is awaited
            failure = exc
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle, value, failure)

    threading.Thread(target=work, daemon=True, name="immich").start()
    return await done
