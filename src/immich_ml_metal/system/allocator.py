"""Hands memory that was freed back to the system, which allocators otherwise keep for later."""

import ctypes
import sys

_M_ARENA_MAX = -8  # glibc's <malloc.h>
_ARENAS = 2


def limit_arenas() -> None:
    """Let glibc share two heaps between all threads instead of keeping one for each.

    Each heap keeps its own peak; pictures pass through many threads. Call before threads start.
    """
    library = ctypes.CDLL(None)
    if sys.platform == "linux" and hasattr(library, "mallopt"):  # not in musl
        library.mallopt(_M_ARENA_MAX, _ARENAS)


def release_free_memory() -> None:
    """Return what can be returned. Blocks for some milliseconds; any thread.

    glibc keeps freed pages of other threads' arenas until asked (`malloc_trim`); on macOS the zones
    are asked the same way (`malloc_zone_pressure_relief`, <malloc/malloc.h>; not run on a Mac yet).
    """
    library = ctypes.CDLL(None)
    if sys.platform == "darwin":
        relieve = library.malloc_zone_pressure_relief
        relieve.argtypes, relieve.restype = [ctypes.c_void_p, ctypes.c_size_t], ctypes.c_size_t
        relieve(None, 0)
    elif hasattr(library, "malloc_trim"):  # not in musl
        library.malloc_trim(0)
