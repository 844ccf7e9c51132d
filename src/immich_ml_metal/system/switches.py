"""Switches of libraries that must be set before these are imported: nothing else would reach them.

Set by the package itself, so that no process of ours can forget it, and inherited by children. A
switch that the operator has set, either way, stays as it is.
"""

import os
import sys
from collections.abc import Mapping
from types import MappingProxyType

# Libraries that would report home. Each row goes when its library no longer does so by default.
_QUIET = {
    # Since 1.29 it sends each session's facts to its vendor and keeps a device id in the home.
    "ORT_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
# On an M5, MLX drops 13 of the 23 bits of float32 operands in matrix products (TF32), which is
# less exact than float16, and reads this once, at the first product. It goes when MLX multiplies
# float32 as float32 without being asked.
_EXACT = {"MLX_ENABLE_TF32": "0"}
SWITCHES: Mapping[str, str] = MappingProxyType(_QUIET | _EXACT)


def worker_environment() -> dict[str, str]:
    """The environment of a worker: ours, with huge pages for its heap where glibc gives them.

    A text detector asks for 270,000 small pages a dozen runs, a quarter of its time. glibc reads
    this when a process starts.
    """
    huge_pages = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"} if sys.platform == "linux" else {}
    return huge_pages | os.environ


def exactness() -> Mapping[str, str]:
    """The switches that decide how exactly is computed, as they are in force."""
    return {name: os.environ.get(name, "") for name in _EXACT}


def set_switches() -> None:
    """Set every switch that nobody has set."""
    for name, value in SWITCHES.items():
        os.environ.setdefault(name, value)
