"""Threads for work that is neither quick nor on a device, and how many of them pay.

An accelerator's own threads are in `backends.device`.
"""

import asyncio
import contextvars
import ctypes
import functools
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from immich_ml_metal.errors import InferenceError
from immich_ml_metal.urgency import Urgency, settle_thread

T = TypeVar("T")


def core_count() -> int:
    """Cores this process may use."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def inference_cores() -> int:
    """Cores that share one inference: on a Mac its performance cores only.

    The threads of an inference wait for the slowest of them, and an efficiency core is several
    times slower than the others. Decoding and preparing pictures may use every core.
    """
    fast = _read_sysctl("hw.perflevel0.logicalcpu") if sys.platform == "darwin" else 0
    return fast or core_count()


@functools.cache
def _read_sysctl(name: str) -> int:
    """A number that macOS tells of itself, asked without a process; 0 where it has none."""
    value, size = ctypes.c_int(0), ctypes.c_size_t(ctypes.sizeof(ctypes.c_int))
    ask = getattr(ctypes.CDLL(None), "sysctlbyname", None)
    if ask is None or ask(name.encode(), ctypes.byref(value), ctypes.byref(size), None, 0) != 0:
        return 0
    return max(0, value.value)


def contained(func: Callable[[], T]) -> T:
    """Call `func` on a thread; what no caller could be given becomes an ordinary error.

    A panic in a Rust library (tokenizers) is no Exception, so nobody would answer for it; asyncio
    futures refuse StopIteration, so its caller would wait for ever.

    Raises:
        InferenceError: in place of the two.
    """
    try:
        return func()
    except StopIteration as exc:
        raise InferenceError("an iterator ended early (StopIteration)") from exc
    except Exception:
        raise
    except BaseException as exc:  # a panic, see above
        raise InferenceError(f"{type(exc).__name__}: {exc}") from exc


class CpuThreads:
    """Threads for work that is neither quick nor on a device: decoding, preparing, finishing.

    Each class of work has its own, at its own priority; they start when they are first needed.
    """

    def __init__(self, count: int) -> None:
        """`count` threads for each class; 0 means one per core."""
        self._threads = {
            urgency: executor(urgency, count if count > 0 else core_count(), "cpu")
            for urgency in Urgency
        }

    async def run(self, func: Callable[[], T], urgency: Urgency = Urgency.PICTURES) -> T:
        """Await `func()` on a thread of its class, with the caller's context variables."""
        context = contextvars.copy_context()
        loop = asyncio.get_running_loop()
        threads = self._threads[urgency]
        return await loop.run_in_executor(threads, lambda: context.run(contained, func))

    def close(self) -> None:
        """Let what runs finish and end the threads."""
        for threads in self._threads.values():
            threads.shutdown(wait=True, cancel_futures=True)


def executor(urgency: Urgency, count: int, name: str) -> ThreadPoolExecutor:
    """`count` threads at the priority of a class, named `cpu-text_0` and so on."""
    return ThreadPoolExecutor(
        max_workers=count,
        thread_name_prefix=f"{name}-{urgency.name.lower()}",
        initializer=settle_thread,
        initargs=(urgency,),
    )
