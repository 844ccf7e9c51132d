"""Try the README's lines in an empty Debian, as a stranger would: `sudo make try-install`.

Makes a root file system with debootstrap that holds Debian's smallest set, Python and make. There
an ordinary user with an empty home copies the lines of README.md ("Start") in a fresh checkout. In
a second room the built wheel is installed by the lines of docs/start.md: `uv`, `pipx`, the lock.
Everything is timed.

How this machine reaches Debian and the package index (names, certificates, variables) is lent to
the rooms as it is. Needs root, for chroot.
"""

import argparse
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from doc_blocks import ROOT, lines_of

SUITE = "trixie"
PACKAGES = "python3,python3-venv,make"
USER = 1000
HOME = "/home/me"
CHECKOUT = f"{HOME}/immich-ml-metal"
LENT_FILES = ("/etc/resolv.conf", "/etc/hosts", "/etc/pip.conf", "/etc/xdg/pip", "/etc/ssl/certs")
LENT_NAMES = re.compile(r"(PIP|UV)_(?!FIND_LINKS)|.*(CERT|CA_BUNDLE)|.*_PROXY$", re.IGNORECASE)
LEAST_PATH = "/usr/local/bin:/usr/bin:/bin"
START_LIMIT_S = 900.0
NO_SERVICE_MANAGER = "service install"  # a room without systemd: only with --print


def main() -> None:
    """Build the rooms, run the lines, print what each took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", default=SUITE, help="of Debian")
    parser.add_argument("--base", type=Path, help="an empty root file system made before")
    chosen = parser.parse_args()
    if os.geteuid() != 0 or shutil.which("debootstrap") is None:
        sys.exit("needs root and debootstrap: sudo apt install debootstrap; sudo make try-install")
    with tempfile.TemporaryDirectory() as scratch:
        base = chosen.base or make_base(Path(scratch) / "base", chosen.suite)
        with room(base, Path(scratch) / "checkout") as first:
            try_checkout(first)
        with room(base, Path(scratch) / "wheel") as second:
            try_wheel(second)
    print("try-install: ok")


def make_base(folder: Path, suite: str) -> Path:
    """An empty Debian with nothing but Python and make."""
    begun_s = time.monotonic()
    command = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", suite, str(folder)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    tell("debootstrap", time.monotonic() - begun_s)
    return folder


class Room:
    """A root file system with one ordinary user who has an empty home."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.variables = {name: value for name, value in os.environ.items() if is_lent(name)}
        self.variables |= {"HOME": HOME, "PATH": LEAST_PATH, "LANG": "C.UTF-8", "TERM": "xterm"}

    def argv(self, command: str, folder: str) -> list[str]:
        """How `command` is run inside."""
        inner = ["env", "-i", *(f"{name}={value}" for name, value in self.variables.items())]
        shell = ["sh", "-c", f"cd {folder} && exec sh -c '{command}'"]
        return ["chroot", f"--userspec={USER}:{USER}", str(self.root), *inner, *shell]

    def run(self, command: str, folder: str = HOME, expect: str = "") -> str:
        """Run one line, time it, and stop everything when it fails or does not say `expect`.

        `doctor` may end with 1: a machine that does not reach the hub is told so.
        """
        begun_s = time.monotonic()
        done = subprocess.run(
            self.argv(command, folder), capture_output=True, text=True, check=False
        )
        said = done.stdout + done.stderr
        fine = (0, 1) if command.endswith("doctor") else (0,)
        if done.returncode not in fine or expect not in said:
            sys.exit(f"{command!r} ended with {done.returncode}, wanted {expect!r}:\n{said}")
        tell(command, time.monotonic() - begun_s)
        return said

    def serve(self, command: str, folder: str = HOME) -> None:
        """Start it on a terminal, wait for the lines that a person needs, ask it, press Ctrl-C."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.variables["ML_PORT"] = str(port)
        begun_s = time.monotonic()
        ours, theirs = pty.openpty()
        argv = self.argv(command, folder)
        child = subprocess.Popen(argv, stdout=theirs, stderr=theirs, start_new_session=True)
        os.close(theirs)
        try:
            shown = read_until(ours, f":{port} in a browser", begun_s + START_LIMIT_S)
            tell(f"{command}, up to its address", time.monotonic() - begun_s)
            answer = urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5).read()
            assert answer == b"pong", answer
            assert "Machine Learning Settings" in shown, shown
        finally:
            os.killpg(child.pid, signal.SIGINT)
            child.wait(30)
            os.close(ours)
            del self.variables["ML_PORT"]


def read_until(terminal: int, words: str, end_s: float) -> str:
    """What a terminal shows, up to `words`."""
    shown = ""
    while words not in shown:
        try:
            piece = os.read(terminal, 4096)
        except OSError:  # its other end is closed
            piece = b""
        if not piece or time.monotonic() > end_s:
            sys.exit(f"{words!r} did not come:\n{shown}")
        shown += piece.decode(errors="replace")
    return shown


def is_lent(name: str) -> bool:
    """Whether a variable says how the package index is reached from here."""
    return LENT_NAMES.match(name) is not None


@contextmanager
def room(base: Path, root: Path) -> Iterator[Room]:
    """A copy of `base` with /proc, the way to the package index, and a user."""
    subprocess.run(["cp", "-a", str(base), str(root)], check=True)
    for lent in map(Path, LENT_FILES):
        inside = root / lent.relative_to("/")
        inside.parent.mkdir(parents=True, exist_ok=True)
        if lent.exists():  # links are followed: the room does not have what they lead to
            copy = ["cp", "-rL", "--remove-destination", str(lent), str(inside.parent)]
            subprocess.run(copy, check=True)
    (root / HOME[1:]).mkdir()
    os.chown(root / HOME[1:], USER, USER)
    with (root / "etc/passwd").open("a") as users:
        users.write(f"me:x:{USER}:{USER}::{HOME}:/bin/sh\n")
    subprocess.run(["mount", "-t", "proc", "proc", str(root / "proc")], check=True)
    try:
        yield Room(root)
    finally:
        subprocess.run(["umount", str(root / "proc")], check=True)


def try_checkout(inside: Room) -> None:
    """The lines of README's "Start", in a checkout of what is committed."""
    folder = inside.root / CHECKOUT[1:]
    folder.mkdir()
    command = ["git", "-c", "safe.directory=*", "archive", "HEAD"]
    archive = subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive, check=True)
    subprocess.run(["chown", "-R", f"{USER}:{USER}", str(folder)], check=True)
    said = {"make demo": "lines read", "doctor": "packages", "--print": "ExecStart="}
    for line in lines_of("README.md", "## Start"):
        if line == "make serve":
            inside.serve(line, CHECKOUT)
        elif not line.endswith(NO_SERVICE_MANAGER):
            wanted = next((words for part, words in said.items() if part in line), "")
            inside.run(line, CHECKOUT, wanted)


def try_wheel(inside: Room) -> None:
    """The lines of docs/start.md for `uv`, for `pipx` and for the lock, with the built wheel."""
    index = inside.root / "index"
    hatch = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(index)]
    subprocess.run(hatch, cwd=ROOT, check=True, capture_output=True)
    shutil.copy(ROOT / "requirements.lock", index)
    inside.run("python3 -m venv tools && tools/bin/pip install --quiet uv pipx")
    inside.variables |= {"UV_FIND_LINKS": "/index", "PIP_FIND_LINKS": "/index"}
    inside.variables["PATH"] = f"{HOME}/.local/bin:{HOME}/tools/bin:{LEAST_PATH}"
    uv, pipx, *from_lock = lines_of("docs/start.md", "## As a program of its own")
    for line in (uv, pipx):
        inside.run(line)
        use(inside, "immich-ml-metal")
        inside.run(f"{line.split()[0]} {'tool ' if line == uv else ''}uninstall immich-ml-metal")
        left = list((inside.root / f"{HOME}/.local/bin"[1:]).glob("immich-ml-metal"))
        assert not left, f"{line} left {left}"
    *install, serve = from_lock
    for line in install:
        inside.run(line, "/index")
    inside.serve(serve)


def use(inside: Room, program: str) -> None:
    """A first look at an installed program."""
    inside.serve(f"{program} serve")
    inside.run(f"{program} demo", expect="lines read")
    inside.run(f"{program} doctor", expect="packages")
    inside.run(f"{program} service install --print", expect="ExecStart=")
    inside.run(f"{program} service uninstall")


def tell(step: str, seconds: float) -> None:
    """One line for a finished step."""
    print(f"{seconds:7.1f} s  {step}", flush=True)


if __name__ == "__main__":
    main()
