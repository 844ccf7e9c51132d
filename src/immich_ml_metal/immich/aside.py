"""A blocking call beside the event loop, on a thread that keeps nobody from ending.

The loop's own pool would not do: its threads are joined at exit, and a name server that does not
answer holds one for longer than a stop may take.
"""

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


async def aside(call: Callable[[], T]) -> T:
    """What `call` returns or raises. A caller that is cancelled leaves it running to its end."""
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
