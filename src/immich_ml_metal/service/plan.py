"""What a service manager is told to run: a program path that survives upgrades, and its logs."""

import math
import re
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from immich_ml_metal.errors import ServiceError
from immich_ml_metal.logs import stderr_of
from immich_ml_metal.settings import Settings
from immich_ml_metal.system.paths import at_home

PROGRAM = "immich-ml-metal"
JOB = "immich-ml-metal.service"  # what both managers call it
# A service in a crash loop must not heat the Mac all night.
THROTTLE_S = 10
# The gateway keeps its drain limit; killed within it, answers would be lost.
_END_S = 10
_CELLAR = re.compile(r"^(?P<prefix>.+)/Cellar/[^/]+/[^/]+/")


class ServiceFailed(ServiceError):
    """The service manager did not do what it was asked."""


@dataclass(frozen=True, slots=True)
class ServicePlan:
    """Everything a definition file says.

    Attributes:
        command: program and arguments.
        environment: variables of the service; nothing secret, the files are readable by others.
        log_file: the gateway's log, rotated by us; the worker's lies beside it.
        stderr_file: what could not be logged (a native abort's last words); emptied at a cap.
        stop_timeout_s: time to answer what is in flight before the process is killed.
    """

    command: tuple[str, ...]
    log_file: Path
    stop_timeout_s: int
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def stderr_file(self) -> Path:
        """Beside the log."""
        return stderr_of(self.log_file)


@dataclass(frozen=True, slots=True)
class ServiceStatus:
    """Where the service stands with its manager."""

    state: Literal["running", "stopped", "none"]
    pid: int | None = None
    last_exit: str = ""


class Manager(Protocol):
    """A service manager."""

    @property
    def definition(self) -> Path:
        """The file that defines the service."""
        ...

    def render(self, plan: ServicePlan) -> str:
        """The text of the definition."""
        ...

    def command(self) -> tuple[str, ...]:
        """What the definition on disk runs; empty when nothing is installed."""
        ...

    def validate(self, text: str) -> str:
        """What the system's own checker says against the text; empty when nothing."""
        ...

    def install(self, plan: ServicePlan) -> None:
        """Write the definition, replace a running service by it, start at boot."""
        ...

    def reload(self) -> None:
        """Run what the definition on disk says, in place of what runs."""
        ...

    def uninstall(self) -> None:
        """Stop the service and remove the definition."""
        ...

    def start(self) -> None:
        """Start it now."""
        ...

    def stop(self) -> None:
        """Stop it until the next start or boot."""
        ...

    def restart(self) -> None:
        """Replace the running process."""
        ...

    def status(self) -> ServiceStatus:
        """Whether it is installed and running."""
        ...


def find_program(argv0: str, path: str | None = None) -> tuple[str, ...]:
    """The command that will still be there after an upgrade.

    Links are kept, not resolved: `~/.local/bin` and `/opt/homebrew/bin` stay, what they point to
    moves with every version. A path into a Homebrew Cellar is turned into the prefix's link.
    """
    for candidate in (argv0, shutil.which(PROGRAM, path=path)):
        if candidate and Path(candidate).name == PROGRAM and Path(candidate).is_file():
            return (stable_path(candidate),)
    return (sys.executable, "-m", "immich_ml_metal")


def stable_path(program: str) -> str:
    """`/opt/homebrew/Cellar/x/1.2/bin/x` → `/opt/homebrew/bin/x`, if that exists."""
    absolute = Path(program).absolute()
    match = _CELLAR.match(str(absolute))
    if match is not None:
        linked = Path(match["prefix"]) / "bin" / absolute.name
        if linked.exists():
            return str(linked)
    return str(absolute)


def make_plan(
    settings: Settings,
    command: tuple[str, ...],
    log_folder: Path,
    *,
    config_file: Path | None = None,
) -> ServicePlan:
    """The plan for these settings; a settings file is named, its values are not copied."""
    arguments = ["serve"]
    if config_file is not None:
        arguments += ["--config", str(at_home(config_file).absolute())]
    log_file = settings.log_file.expanduser() if settings.log_file else log_folder / "service.log"
    return ServicePlan(
        command=(*command, *arguments),
        log_file=log_file,
        stop_timeout_s=math.ceil(settings.drain_limit_s) + _END_S,
        environment={"ML_LOG_FILE": str(log_file), "PYTHONDONTWRITEBYTECODE": "1"},
    )
