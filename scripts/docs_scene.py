"""Where `run_docs.py` runs the pages' commands: a home network in one process's namespaces.

This machine is 192.168.1.20, its user's home /home/you with a checkout, Immich's usual models and
some photos. Another machine, 192.168.1.30, is `nas` with a stand-in for Immich at 2283, and
`docker-host` with a second service at 3003 and one that squashes pictures at 3005. `systemctl` is a
stand-in. Nothing of it touches the machine that it runs on, and there is no way to the internet.
"""

import asyncio
import importlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
BIN = Path(sys.executable).parent
HOME = Path("/home/you")
CHECKOUT = HOME / "immich-ml-metal"
MINE, OTHER = "192.168.1.20", "192.168.1.30"
HOSTS = f"127.0.0.1 localhost\n{MINE} mac.local\n{OTHER} nas docker-host\n"
PROGRAMS = f"{HOME}/stand-ins:{HOME}/.local/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
VARIABLES = {"HOME": str(HOME), "PATH": PROGRAMS, "LANG": "C.UTF-8", "USER": "you"}
VARIABLES |= {"TERM": "dumb", "COLUMNS": "100"}
FACES = "facial-recognition"
HIDDEN_MODELS = "later/immich_ml"  # until somebody downloads them
IMMICH_KEY = "..."  # as the pages write it
PATIENCE_S = 90.0


def enter() -> Path:
    """Run this program again in namespaces of its own, and give it there a folder to work in.

    What is mounted there is seen nowhere else, and is gone before the folder is removed.
    """
    if "--inside" in sys.argv:
        return Path(sys.argv[sys.argv.index("--inside") + 1])
    own = ["--user", "--map-root-user"] if os.geteuid() else []
    kinds = ["--net", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]
    with tempfile.TemporaryDirectory() as scratch:
        again = [sys.executable, *sys.argv, "--inside", scratch]
        sys.exit(subprocess.run(["unshare", *own, *kinds, *again], check=False).returncode)


@contextmanager
def scene(scratch: Path, models: Path) -> Iterator[Mapping[str, str]]:
    """Build it; gives the variables that a shell of its user has."""
    lay_out_models(models, scratch / "home" / "you")
    lay_out_squashing(models, scratch / "squashing")
    furnish_home(scratch)
    with other_machine() as on_it:
        others = {"ML_STATE_DIR": str(scratch / "squashes"), "ML_PORT": "3005"}
        others |= {"ML_MODELS_DIR": str(scratch / "squashing")}
        program = [str(BIN / "immich-ml-metal"), "serve"]
        neighbours = [
            start([*on_it, sys.executable, __file__, "immich"], {}),
            start([sys.executable, "-m", "http.server", "8000"], {}),
            start([*on_it, *program], {"ML_STATE_DIR": str(scratch / "other")}),
            start([*on_it, *program], others),
        ]
        for port, path in ((2283, "/api/server/version"), (3003, "/ping"), (3005, "/ping")):
            wait_for(f"http://{OTHER}:{port}{path}")
        yield VARIABLES
        for neighbour in neighbours:
            neighbour.terminate()


def furnish_home(scratch: Path) -> None:
    """/home/you, over whatever else is in /home, which stays where it was."""
    assert os.getpid() == 1, "this belongs into namespaces of its own"
    homes, former = scratch / "home", scratch / "former"
    former.mkdir()
    run("mount", "--rbind", "/home", former)
    run("mount", "--bind", homes, "/home")
    for folder in former.iterdir():
        Path("/home", folder.name).mkdir(exist_ok=True)
        run("mount", "--rbind", folder, f"/home/{folder.name}")
    hosts = scratch / "hosts"
    hosts.write_text(HOSTS)
    run("mount", "--bind", hosts, "/etc/hosts")
    lay_out_checkout()
    place_programs()
    lay_out_photos()


def lay_out_checkout() -> None:
    """The files that git knows, and an environment with what `make` would have installed."""
    listed = subprocess.run(
        ["git", "-c", "safe.directory=*", "ls-files"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    for name in listed.stdout.splitlines():
        if (source := ROOT / name).is_file():
            (CHECKOUT / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, CHECKOUT / name)
    environment = CHECKOUT / ".venv"
    environment.mkdir()
    for part in BIN.parent.iterdir():
        (environment / part.name).symlink_to(part)
    made = run("make", "-pn", "setup", folder=CHECKOUT)
    stamp = next(line.split()[-1] for line in made.splitlines() if line.startswith("SERVE := "))
    (CHECKOUT / stamp).touch()


def place_programs() -> None:
    """Ours where `uv tool` puts it, and the stand-in for systemctl."""
    local, stand_ins = HOME / ".local" / "bin", HOME / "stand-ins"
    local.mkdir(parents=True)
    stand_ins.mkdir()
    (local / "immich-ml-metal").symlink_to(BIN / "immich-ml-metal")
    double = ROOT / "tests" / "doubles" / "systemctl.py"
    (stand_ins / "systemctl").write_text(f'#!/bin/sh\nexec {sys.executable} {double} "$@"\n')
    (stand_ins / "systemctl").chmod(0o755)
    (stand_ins / "python").write_text(f'#!/bin/sh\nexec {BIN / "python"} "$@"\n')
    (stand_ins / "python").chmod(0o755)


def lay_out_photos() -> None:
    """Pictures of all shapes, one of them broken; a model; Immich's own settings file."""
    photos = HOME / "Pictures" / "sample"
    photos.mkdir(parents=True)
    for picture in (SHARED / "images").iterdir():
        if not picture.name.startswith("bad") or "truncated" in picture.name:
            shutil.copy(picture, photos)
    recogniser = HOME / HIDDEN_MODELS / "ocr" / "PP-OCRv6_tiny" / "recognition" / "model.onnx"
    shutil.copy(recogniser, CHECKOUT / "MODEL.onnx")
    shutil.copy(CHECKOUT / "deploy" / "haproxy.cfg", CHECKOUT)
    names = ("MACHINE_LEARNING_PRELOAD__CLIP=ViT-B-32__openai", "MACHINE_LEARNING_WORKERS=1")
    (HOME / "immich" / ".env").write_text("\n".join(names) + "\n")


def lay_out_models(models: Path, home: Path) -> None:
    """Immich's usual models, as if they had been downloaded; the files are shared, not copied."""
    for cache in (home / HIDDEN_MODELS, home / "immich" / "model-cache"):
        cache.parent.mkdir(parents=True)
        run("cp", "-al", models, cache)
        run("cp", "-al", cache / FACES / "buffalo_s", cache / FACES / "buffalo_m")


def lay_out_squashing(models: Path, cache: Path) -> None:
    """The same models, but that the search model's pictures are squashed instead of cropped."""
    run("cp", "-al", models, cache)
    file = cache / "clip" / "ViT-B-32__openai" / "visual" / "preprocess_cfg.json"
    text = file.read_text().replace("shortest", "squash")
    file.unlink()  # it is shared
    file.write_text(text)


def show_models(*, wanted: bool) -> None:
    """Let the user have the models, or not yet."""
    hidden, shown = HOME / HIDDEN_MODELS, HOME / ".cache" / "immich_ml"
    if wanted and hidden.exists():
        shown.parent.mkdir(exist_ok=True)
        shutil.rmtree(shown, ignore_errors=True)
        hidden.rename(shown)


def make_models(folder: Path) -> Path:
    """The test models under the names of Immich's usual ones."""
    if not folder.exists():
        run(sys.executable, SHARED / "models" / "make_cache.py", folder, "--buffalo-l")
    return folder


@contextmanager
def other_machine() -> Iterator[list[str]]:
    """A second machine on our network; gives what to write before a command to run it there."""
    sleeper = subprocess.Popen(["unshare", "--net", "sleep", "infinity"])
    on_it = ["nsenter", "-t", str(sleeper.pid), "-n"]
    ours, theirs = Path("/proc/self/ns/net"), Path(f"/proc/{sleeper.pid}/ns/net")
    while ours.readlink() == theirs.readlink():
        time.sleep(0.05)
    pair = ["ip", "link", "add", "lan", "type", "veth", "peer", "name", "lan"]
    run(*pair, "netns", str(sleeper.pid))
    for there, address in (([], MINE), (on_it, OTHER)):
        run(*there, "ip", "link", "set", "lo", "up")
        run(*there, "ip", "address", "add", f"{address}/24", "dev", "lan")
        run(*there, "ip", "link", "set", "lan", "up")
    try:
        yield on_it
    finally:
        sleeper.kill()
        sleeper.wait()


def start(command: list[str], variables: Mapping[str, str]) -> "subprocess.Popen[bytes]":
    """Run a neighbour; quiet."""
    return subprocess.Popen(
        command, env={**VARIABLES, **variables}, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT
    )


def wait_for(url: str, patience_s: float = PATIENCE_S) -> None:
    """Wait until somebody answers there.

    Raises:
        TimeoutError: nobody did.
    """
    end_s = time.monotonic() + patience_s
    while time.monotonic() < end_s:
        with suppress(OSError):
            urllib.request.urlopen(url, timeout=2)
            return
        time.sleep(0.1)
    raise TimeoutError(f"nothing answers at {url}")


def run(*command: str | Path, folder: Path = ROOT) -> str:
    """Run a program of the scene's set-up and give what it says."""
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=folder, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout


def serve_immich() -> None:
    """Stand for Immich: its settings name our service, its queues have numbers and do not work."""
    sys.path.insert(0, str(ROOT / "tests"))
    import uvicorn

    immich: Any = importlib.import_module("doubles.immich")  # its key is changed
    immich.KEY = IMMICH_KEY
    double = immich.ImmichDouble(f"http://{MINE}:3003")
    double.upload(320)
    double.queues["smartSearch"].active = 2
    config = uvicorn.Config(double.app, host=OTHER, port=2283, lifespan="off", log_level="error")
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    asyncio.run(uvicorn.Server(config).serve())


if __name__ == "__main__":
    serve_immich()
