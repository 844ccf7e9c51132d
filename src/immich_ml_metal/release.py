"""Hands memory that was freed back to the system, which allocators otherwise keep for later."""

import ctypes
import sys


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
