"""How much memory a process takes, in the sense of its system."""

import ctypes
import sys
from pathlib import Path

import psutil


class _RusageInfo(ctypes.Structure):
    """`struct rusage_info_v0` of macOS's <sys/resource.h>."""

    _fields_ = [  # ctypes wants a plain list
        ("uuid", ctypes.c_uint8 * 16),
        ("user_time", ctypes.c_uint64),
        ("system_time", ctypes.c_uint64),
        ("pkg_idle_wkups", ctypes.c_uint64),
        ("interrupt_wkups", ctypes.c_uint64),
        ("pageins", ctypes.c_uint64),
        ("wired_size", ctypes.c_uint64),
        ("resident_size", ctypes.c_uint64),
        ("phys_footprint", ctypes.c_uint64),
        ("proc_start_abstime", ctypes.c_uint64),
        ("proc_exit_abstime", ctypes.c_uint64),
    ]


def memory_bytes(pid: int) -> int | None:
    """Memory of a process, None when it is gone or no file can be opened to ask.

    On macOS the physical footprint, as Activity Monitor shows it: resident memory leaves out what
    Metal holds and what was compressed. Elsewhere the resident memory.
    """
    if sys.platform == "darwin":
        return _footprint(pid)
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except (psutil.Error, OSError):
        return None


def private_bytes(pid: int) -> int | None:
    """Memory that is a process's own and cannot be read again from a file; None when it is gone.

    Mapped models are left out: the system drops their pages when it needs room. On macOS the
    physical footprint.
    """
    if sys.platform == "darwin":
        return _footprint(pid)
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return None
    kib = next((line.split()[1] for line in lines if line.startswith("Anonymous:")), "0")
    return 1024 * int(kib)


def _footprint(pid: int) -> int | None:
    info = _RusageInfo()
    library = ctypes.CDLL("/usr/lib/libproc.dylib", use_errno=True)
    if library.proc_pid_rusage(pid, 0, ctypes.byref(info)) != 0:
        return None
    return int(info.phys_footprint)
