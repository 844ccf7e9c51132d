"""What macOS keeps from a job that nobody clicked on: some folders, and the local network."""

import ipaddress
import sys
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit

from immich_ml_metal.settings import Settings

# Of a home folder; a job of launchd gets "Operation not permitted" there without being asked.
_PRIVATE = ("Documents", "Desktop", "Downloads")
_VOLUMES = Path("/Volumes")
_LOCAL_NAMES = (".local", ".lan", ".home", ".internal", ".localdomain")
LOCAL_NETWORK_SINCE = 15  # of macOS


def used_paths(settings: Settings, config: Path | None) -> list[Path]:
    """Every place that the installed service reads or writes, the Python it runs with included."""
    paths = [settings.models_dir, settings.state_folder, Path(sys.prefix), config]
    return [path.expanduser().absolute() for path in paths if path is not None]


def unreadable(paths: Iterable[Path], home: Path) -> list[Path]:
    """Those that a job of launchd may not read."""
    closed = [*(home / name for name in _PRIVATE), _VOLUMES]
    return [path for path in paths if any(path.is_relative_to(folder) for folder in closed)]


def explain_unreadable(paths: Iterable[Path]) -> str:
    """What is wrong with these, and what to do."""
    return (
        f"macOS does not let a job of launchd read {', '.join(map(str, paths))}: move it elsewhere "
        "in your home folder, or give this Python Full Disk Access in System Settings, Privacy & "
        "Security"
    )


def needs_local_network(settings: Settings, release: str) -> bool:
    """Whether the service calls a machine in the local network, which macOS 15 must allow.

    Connections that others make to the service need no permission.
    """
    major = release.partition(".")[0]
    if settings.immich_url is None or not major.isdigit() or int(major) < LOCAL_NETWORK_SINCE:
        return False
    return _is_local(urlsplit(settings.immich_url).hostname or "")


def _is_local(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host != "localhost" and ("." not in host or host.endswith(_LOCAL_NAMES))
    return address.is_private and not address.is_loopback


EXPLAIN_LOCAL_NETWORK = (
    "the service may reach Immich in your network only once you allow it: System Settings, Privacy "
    "& Security, Local Network, switch on Python (macOS asks at the first try)"
)
