"""Stands for `systemctl --user`: starts what the unit on disk says, and remembers its process.

Knows the words that the service manager says to it, and refuses others. One unit, no dependencies,
no restart after a crash: real systemd does that.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

UNITS = Path("~/.config/systemd/user").expanduser()
MEMORY = Path("~/.local/state/systemctl").expanduser()
STOP_S = 40.0


def main(words: list[str]) -> int:
    """Do what is asked; the exit code."""
    assert words[0] == "--user", words
    verb, *rest = words[1:]
    names = [word for word in rest if not word.startswith("--")]
    if verb in ("stop", "restart", "disable"):
        stop()
    if verb in ("start", "restart"):
        return start(UNITS / names[0])
    if verb == "show":
        pid = running()
        state = "active" if pid else "inactive"
        print(f"ActiveState={state}\nMainPID={pid or 0}\nResult=success\nExecMainStatus=0")
    return 0 if verb in ("stop", "disable", "show", "enable", "daemon-reload") else 1


def start(unit: Path) -> int:
    """Run the unit's program as systemd would: its variables, no terminal, a session of its own."""
    if running():
        return 0
    lines = [line.partition("=") for line in unit.read_text().splitlines()]
    command = next(value for name, _, value in lines if name == "ExecStart")
    added = [
        shlex.split(value)[0].partition("=") for name, _, value in lines if name == "Environment"
    ]
    bare = {name: os.environ[name] for name in ("HOME", "PATH")}
    child = subprocess.Popen(
        shlex.split(command),
        env=bare | {name: value for name, _, value in added},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    MEMORY.parent.mkdir(parents=True, exist_ok=True)
    MEMORY.write_text(str(child.pid))
    return 0


def stop() -> None:
    """End it as systemd does, and wait."""
    end_s = time.monotonic() + STOP_S
    if pid := running():
        os.kill(pid, signal.SIGTERM)
        while running() and time.monotonic() < end_s:
            time.sleep(0.1)


def running() -> int | None:
    """The process, if it is there and no zombie."""
    try:
        pid = int(MEMORY.read_text())
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, ValueError):
        return None
    return None if state == "Z" else pid


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
