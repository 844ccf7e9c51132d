"""Which service manager this system has."""

import getpass
import os
import platform
from pathlib import Path

from immich_ml_metal.service.launchd import DAEMONS, Launchd
from immich_ml_metal.service.plan import Manager, ServiceFailed
from immich_ml_metal.service.systemd import Systemd
from immich_ml_metal.system.programs import RunProgram


def choose_manager(run: RunProgram, *, daemon: bool = False, system: str | None = None) -> Manager:
    """The manager of this system.

    Raises:
        ServiceFailed: there is none that we know.
    """
    system = system or platform.system()
    if system == "Darwin":
        daemons = DAEMONS if daemon else None
        return Launchd(run, Path.home(), os.getuid(), user=_login_user(), daemons=daemons)
    if system == "Linux":
        if daemon:
            raise ServiceFailed("--daemon is for macOS; on Linux: loginctl enable-linger")
        return Systemd(run, Path.home() / ".config")
    raise ServiceFailed(f"no service manager is known for {system}")


def _login_user() -> str:
    """Who logged in, also under sudo: a daemon must not run as root."""
    try:
        return os.getlogin()
    except OSError:  # no terminal
        return getpass.getuser()
