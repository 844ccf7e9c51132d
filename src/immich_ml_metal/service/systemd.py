"""systemd: a unit of the user's own manager."""

import shlex
import tempfile
from pathlib import Path

from immich_ml_metal.service.plan import JOB, THROTTLE_S, ServiceFailed, ServicePlan, ServiceStatus
from immich_ml_metal.system.owner import make_folder, write_whole
from immich_ml_metal.system.programs import Completed, RunProgram

_NOT_FOUND = 127


class Systemd:
    """One systemd user unit."""

    def __init__(self, run: RunProgram, config_home: Path) -> None:
        """`config_home` is `~/.config`."""
        self._run = run
        self._definition = config_home / "systemd" / "user" / JOB

    @property
    def definition(self) -> Path:
        """The unit file."""
        return self._definition

    def render(self, plan: ServicePlan) -> str:
        """The unit file as text."""
        command = " ".join(_quote(word).replace("$", "$$") for word in plan.command)
        environment = "\n".join(
            f"Environment={_quote(f'{name}={value}')}" for name, value in plan.environment.items()
        )
        return f"""[Unit]
Description=Machine learning for Immich (immich-ml-metal)
# Of a user's units none can wait for the network: an address that is not there yet ends a start
# with 1, and the next one is tried. A wrong setting ends it with 2, for good.
StartLimitIntervalSec=0

[Service]
Type=exec
ExecStart={command}
{environment}
Restart=on-failure
RestartPreventExitStatus=2
RestartSec={THROTTLE_S}
TimeoutStopSec={plan.stop_timeout_s}
# The supervisor ends its worker itself, after what is in flight.
KillMode=mixed
NoNewPrivileges=yes

[Install]
WantedBy=default.target
"""

    def command(self) -> tuple[str, ...]:
        """What the unit on disk runs; empty when there is none that can be read."""
        try:
            lines = self._definition.read_text(encoding="utf-8").splitlines()
            started = next(line for line in lines if line.startswith("ExecStart="))
            words = shlex.split(started.removeprefix("ExecStart="))
        except (OSError, ValueError, StopIteration):
            return ()
        return tuple(word.replace("%%", "%").replace("$$", "$") for word in words)

    def validate(self, text: str) -> str:
        """What `systemd-analyze verify` says; empty where it cannot be asked."""
        try:
            with tempfile.TemporaryDirectory() as folder:
                unit = Path(folder) / JOB
                unit.write_text(text, encoding="utf-8")
                # Not --user: that needs a session's run-time folder; nothing in the unit differs.
                done = self._run("systemd-analyze", "verify", str(unit))
        except OSError:  # no room for a temporary file: the unit is ours, and most likely right
            return ""
        if done.code == _NOT_FOUND:
            return ""
        return "\n".join(line for line in done.err.splitlines() if JOB in line)

    def install(self, plan: ServicePlan) -> None:
        """Write the unit, enable it and start it afresh."""
        make_folder(plan.log_file.parent)
        write_whole(self._definition, self.render(plan).encode())
        self.reload()

    def reload(self) -> None:
        """Read the unit again, enable it and start it afresh."""
        self._must("daemon-reload")
        self._must("enable", JOB)
        self._must("restart", JOB)

    def uninstall(self) -> None:
        """Stop and disable the unit, and remove it."""
        self._ctl("disable", "--now", JOB)
        self._definition.unlink(missing_ok=True)
        self._ctl("daemon-reload")

    def start(self) -> None:
        """Start the unit."""
        self._must("start", JOB)

    def stop(self) -> None:
        """Stop the unit until the next boot or start."""
        self._must("stop", JOB)

    def restart(self) -> None:
        """Restart the unit."""
        self._must("restart", JOB)

    def status(self) -> ServiceStatus:
        """What systemd says of the unit."""
        if not self._definition.exists():
            return ServiceStatus("none")
        done = self._ctl("show", JOB, "--property=ActiveState,MainPID,Result,ExecMainStatus")
        pairs = (line.partition("=") for line in done.out.splitlines())
        facts = {name: value for name, _, value in pairs}
        running = facts.get("ActiveState") in ("active", "activating", "reloading")
        pid = int(facts.get("MainPID", "0") or 0)
        last = "" if running else f"{facts.get('Result', '')} {facts.get('ExecMainStatus', '')}"
        return ServiceStatus("running" if running else "stopped", pid or None, last.strip())

    def _ctl(self, *args: str) -> Completed:
        return self._run("systemctl", "--user", *args)

    def _must(self, *args: str) -> None:
        done = self._ctl(*args)
        if done.code != 0:
            raise ServiceFailed(f"systemctl --user {args[0]}: {done.err.strip() or done.code}")


def _quote(word: str) -> str:
    """A word in a unit file: quoted where it must be, with systemd's own specifiers escaped."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{escaped}"' if any(c in word for c in " \t\"'\\;") else escaped
