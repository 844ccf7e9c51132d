"""Libraries that would report home are told not to, before any of them is imported.

Called by the package itself, so that no process of ours can forget it, and inherited by children.
A switch that the operator has set, either way, stays as it is.
"""

import os
from collections.abc import Mapping
from types import MappingProxyType

# Each row goes when its library no longer reports anything by default.
SWITCHES: Mapping[str, str] = MappingProxyType(
    {
        # Since 1.29 it sends each session's facts to its vendor and keeps a device id in the home.
        "ORT_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
)


def set_switches() -> None:
    """Set every switch that nobody has set."""
    for name, value in SWITCHES.items():
        os.environ.setdefault(name, value)
