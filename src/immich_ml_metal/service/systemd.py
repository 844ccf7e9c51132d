"""systemd: a unit of the user's own manager."""

import tempfile
from pathlib import Path

from immich_ml_metal.service.plan import THROTTLE_S, ServiceFailed, ServicePlan, ServiceStatus
from immich_ml_metal.system.programs import Completed, RunProgram

UNIT = "immich-ml-metal.service"
_NOT_FOUND = 127


class Systemd:
    """One systemd user unit."""

    def __init__(self, run: RunProgram, config_home: Path) -> None:
        """`config_home` is `~/.config`."""
        self._run = run
        self._definition = config_home / "systemd" / "user" / UNIT

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

    def validate(self, text: str) -> str:
        """What `systemd-analyze verify` says; empty where there is no such program."""
        with tempfile.TemporaryDirectory() as folder:
            unit = Path(folder) / UNIT
            unit.write_text(text, encoding="utf-8")
            # Not --user: that needs a session's run-time folder, and nothing in the unit differs.
            done = self._run("systemd-analyze", "verify", str(unit))
        if done.code == _NOT_FOUND:
            return ""
        return "\n".join(line for line in done.err.splitlines() if UNIT in line)

    def install(self, plan: ServicePlan) -> None:
        """Write the unit, enable it and start it afresh."""
        plan.log_file.parent.mkdir(parents=True, exist_ok=True)
        self._definition.parent.mkdir(parents=True, exist_ok=True)
        self._definition.write_text(self.render(plan), encoding="utf-8")
        self._must("daemon-reload")
        self._must("enable", UNIT)
        self._must("restart", UNIT)

    def uninstall(self) -> None:
        """Stop and disable the unit, and remove it."""
        self._ctl("disable", "--now", UNIT)
        self._definition.unlink(missing_ok=True)
        self._ctl("daemon-reload")

    def start(self) -> None:
        """Start the unit."""
        self._must("start", UNIT)

    def stop(self) -> None:
        """Stop the unit until the next boot or start."""
        self._must("stop", UNIT)

    def restart(self) -> None:
        """Restart the unit."""
        self._must("restart", UNIT)

    def status(self) -> ServiceStatus:
        """What systemd says of the unit."""
        if not self._definition.exists():
            return ServiceStatus("none")
        done = self._ctl("show", UNIT, "--property=ActiveState,MainPID,Result,ExecMainStatus")
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
