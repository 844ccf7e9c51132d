"""launchd: an agent of the user who is logged in, or a daemon that needs nobody logged in."""

import plistlib
import re
import shutil
import time
from pathlib import Path
from typing import Any

from immich_ml_metal.service.plan import JOB, THROTTLE_S, ServiceFailed, ServicePlan, ServiceStatus
from immich_ml_metal.system.owner import make_folder, write_whole
from immich_ml_metal.system.programs import RunProgram

DAEMONS = Path("/Library/LaunchDaemons")
# launchctl's codes for a job that is gone (ESRCH, its own) or still on its way out (EINPROGRESS).
_GONE = frozenset({0, 3, 36, 113})
_POLL_S = 0.2
_UNLOAD_TIMEOUT_S = 150.0  # longer than a stop may take to answer what is in flight


class Launchd:
    """One launchd job."""

    def __init__(
        self, run: RunProgram, home: Path, uid: int, *, user: str = "", daemons: Path | None = None
    ) -> None:
        """With `daemons` (a folder), the job is a daemon that runs as `user`; else an agent."""
        self._run = run
        self._user = user
        self._is_daemon = daemons is not None
        self._domain = "system" if self._is_daemon else f"gui/{uid}"
        folder = daemons if daemons is not None else home / "Library" / "LaunchAgents"
        self._definition = folder / f"{JOB}.plist"

    @property
    def definition(self) -> Path:
        """The property list."""
        return self._definition

    @property
    def _target(self) -> str:
        return f"{self._domain}/{JOB}"

    def render(self, plan: ServicePlan) -> str:
        """The property list as text."""
        job: dict[str, Any] = {  # Any: a property list
            "Label": JOB,
            "ProgramArguments": list(plan.command),
            "EnvironmentVariables": dict(plan.environment),
            "RunAtLoad": True,
            # A crash is restarted; an ordinary end, as after `stop`, is not.
            "KeepAlive": {"SuccessfulExit": False},
            "ThrottleInterval": THROTTLE_S,
            "ExitTimeOut": plan.stop_timeout_s,
            # Anything less is kept on the efficiency cores with throttled disk access.
            "ProcessType": "Interactive",
            "StandardOutPath": "/dev/null",
            "StandardErrorPath": str(plan.stderr_file),
            "WorkingDirectory": "/",
        }
        if self._is_daemon:
            job["UserName"] = self._user
        return plistlib.dumps(job, sort_keys=False).decode()

    def command(self) -> tuple[str, ...]:
        """What the property list on disk runs; empty when there is none that can be read."""
        try:
            return tuple(plistlib.loads(self._definition.read_bytes())["ProgramArguments"])
        except (OSError, ValueError, KeyError, plistlib.InvalidFileException):
            return ()

    def validate(self, text: str) -> str:
        """Read the text back, and ask `plutil` where there is one."""
        try:
            job = plistlib.loads(text.encode())
        except (plistlib.InvalidFileException, ValueError) as exc:
            return f"not a property list: {exc}"
        program = Path(job["ProgramArguments"][0])
        return "" if program.is_file() else f"there is no program {program}"

    def install(self, plan: ServicePlan) -> None:
        """Write the definition and load it in place of the old one."""
        make_folder(plan.log_file.parent)
        if self._is_daemon:  # made by root, written by the user
            shutil.chown(plan.log_file.parent, self._user)
        self._write(self.render(plan))
        self.reload()

    def _write(self, text: str) -> None:
        try:
            write_whole(self._definition, text.encode())
            self._definition.chmod(0o644)  # launchd refuses what others may write
        except PermissionError as exc:
            hint = "; run it with sudo" if self._is_daemon else ""
            raise ServiceFailed(f"cannot write {self._definition}{hint}") from exc

    def uninstall(self) -> None:
        """Unload the job and remove its definition."""
        self._unload()
        self._definition.unlink(missing_ok=True)

    def start(self) -> None:
        """Load the job; it runs at load."""
        if self.status().state != "running":
            self._unload()  # it may be loaded but ended
            self._load()

    def stop(self) -> None:
        """Unload the job; its definition stays for the next login or boot."""
        self._unload()

    def restart(self) -> None:
        """Let the process end and load the job again."""
        self.reload()

    def reload(self) -> None:
        """Unload the job, which lets the process answer what it has, and load it again.

        Not `kickstart -k`: it kills, and is not documented to give the process time to end.
        """
        self._unload()
        self._load()

    def status(self) -> ServiceStatus:
        """What `launchctl print` says."""
        done = self._run("launchctl", "print", self._target)
        if done.code != 0:
            return ServiceStatus("stopped" if self._definition.exists() else "none")
        pid = re.search(r"^\s*pid = (\d+)", done.out, re.MULTILINE)
        last = re.search(r"^\s*last exit code = (.+)$", done.out, re.MULTILINE)
        return ServiceStatus(
            "running" if pid else "stopped",
            int(pid[1]) if pid else None,
            last[1].strip() if last else "",
        )

    def _load(self) -> None:
        self._run("launchctl", "enable", self._target)
        self._must("launchctl", "bootstrap", self._domain, str(self._definition))

    def _unload(self) -> None:
        """Returns once the job is gone: loading it while it still ends is refused."""
        done = self._run("launchctl", "bootout", self._target)
        if done.code not in _GONE:
            raise ServiceFailed(f"launchctl bootout: {done.err.strip() or done.code}")
        deadline_s = time.monotonic() + _UNLOAD_TIMEOUT_S
        while self._run("launchctl", "print", self._target).code == 0:
            if time.monotonic() > deadline_s:
                raise ServiceFailed(f"{JOB} does not end within {_UNLOAD_TIMEOUT_S:.0f} s")
            time.sleep(_POLL_S)

    def _must(self, *args: str) -> None:
        done = self._run(*args)
        if done.code != 0:
            raise ServiceFailed(f"{' '.join(args[:2])}: {done.err.strip() or done.code}")
