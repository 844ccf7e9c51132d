"""What keeps `serve` from starting: one line with the place, and `config check` says the same."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from doubles.live import serve
from doubles.snapshots import run
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from immich_ml_metal.cli.ending import ensure_home
from immich_ml_metal.cli.output import Exit
from immich_ml_metal.client.own_service import GREETING

PLAIN = ("setpriv", "--bounding-set=-dac_override,-dac_read_search")  # root reads everything
FILES = {
    "latin.toml": b"port = 3\n# Z\xfcrich\n",
    "wide.toml": "port = 3\n".encode("utf-16"),
    "bad.toml": b"port = 3\nhost = = 1\n",
    "latin.env": b"ML_PORT=3\n\n# Z\xfcrich\n",
    "closed.env": b"",
    "closed.toml": b"",
}
NO_PIPE = "it is a pipe or a device"
REFUSED = {
    "ML_CONFIG_FILE=folder": (Exit.USAGE, "the settings file folder: Is a directory"),
    "ML_CONFIG_FILE=pipe": (Exit.USAGE, f"the settings file pipe: {NO_PIPE}"),
    "ML_CONFIG_FILE=/dev/zero": (Exit.USAGE, f"the settings file /dev/zero: {NO_PIPE}"),
    "ML_CONFIG_FILE=loop": (Exit.USAGE, "the settings file loop: Too many levels"),
    "ML_CONFIG_FILE=latin.toml": (Exit.USAGE, "latin.toml is not UTF-8 (line 2, byte 13)"),
    "ML_CONFIG_FILE=wide.toml": (Exit.USAGE, "wide.toml is not UTF-8 (line 1, byte 1)"),
    "ML_CONFIG_FILE=bad.toml": (Exit.USAGE, "bad.toml is not TOML: "),
    "ML_CONFIG_FILE=closed.toml": (Exit.USAGE, "file closed.toml: Permission denied"),
    "ML_CONFIG_FILE=~nosuch/x": (Exit.USAGE, "~nosuch/x: there is no user nosuch here"),
    "--config=~nosuch/x": (Exit.USAGE, "~nosuch/x: there is no user nosuch here"),
    "--env-file=folder": (Exit.USAGE, "the env file folder: Is a directory"),
    "--env-file=pipe": (Exit.USAGE, f"the env file pipe: {NO_PIPE}"),
    "--env-file=latin.env": (Exit.USAGE, "latin.env is not UTF-8 (line 3, byte 15)"),
    "--env-file=closed.env": (Exit.USAGE, "the env file closed.env: Permission denied"),
    "--env-file=none.env": (Exit.USAGE, "the env file none.env: No such file"),
    "ML_STATE_DIR=~nosuch/x": (Exit.USAGE, "= '~nosuch/x': there is no user nosuch here ("),
    "ML_LOG_FILE=pipe": (Exit.USAGE, "cannot write the log file pipe: it is a pipe (ML_LOG_FILE)"),
    "ML_LOG_FILE=~nosuch/x": (Exit.USAGE, "ML_LOG_FILE = '~nosuch/x': there is no user"),
    "ML_HOST=ä..b": (Exit.USAGE, "cannot listen on ä..b port 0: not a name of a machine"),
    "ML_HOST=192.0.2.1": (Exit.FINDING, "192.0.2.1 port 0: Cannot assign requested address\n"),
    "ML_PORT=TAKEN": (Exit.FINDING, "another program listens there; ML_PORT chooses"),
}


def _answer(request: Request) -> JSONResponse:
    return JSONResponse({"message": GREETING} if request.url.path == "/" else {"version": "1.0"})


healthy = Starlette(routes=[Route(path, _answer) for path in ("/", "/health")])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the command stands: files that cannot be read, each in its way."""
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
        (tmp_path / name).chmod(0 if name.startswith("closed") else 0o644)
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    return tmp_path


def end_of(command: str, broken: str, folder: Path) -> tuple[int, str]:
    """How a command ends that is given this, and what it says; to root, too, modes apply."""
    name, _, value = broken.partition("=")
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(sys.path)}
    env |= {"ML_PORT": "0", "ML_HOST": "127.0.0.1", "ML_OFFLINE": "1", "HOME": str(folder)}
    given = {} if name.startswith("--") else {name: value}
    options = [broken] if name.startswith("--") else []
    program = [*(PLAIN if os.geteuid() == 0 else ()), sys.executable, "-m", "immich_ml_metal"]
    done = subprocess.run(
        [*program, *command.split(), *options],
        capture_output=True,
        text=True,
        cwd=folder,
        env=env | given,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("broken", REFUSED)
def test_serve_and_config_check_end_alike_with_one_line_that_names_the_place(
    broken: str, folder: Path
) -> None:
    if os.geteuid() == 0 and shutil.which("setpriv") is None:
        pytest.skip("root reads everything, and there is no setpriv to make it otherwise")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        given = broken.replace("TAKEN", str(port))
        served, checked = (end_of(command, given, folder) for command in ("serve", "config check"))
    code, words = REFUSED[broken]
    assert served == checked
    assert served[0] == code, served[1]
    assert words in served[1]
    assert served[1].startswith("immich-ml-metal: ")
    assert served[1].count("\n") == 1, served[1]


def test_a_port_that_this_very_service_has_taken_is_as_it_should_be(tmp_path: Path) -> None:
    with serve(healthy) as url:
        said = run(["config", "check"], {"ML_HOST": "127.0.0.1", "ML_PORT": url.rpartition(":")[2]})
    assert said.endswith("The settings are valid.\n-- exit code 0\n"), said


@pytest.mark.parametrize("value", ["/dev/null", "marked.toml"])
def test_a_settings_file_may_be_nothing_or_come_from_windows(value: str, folder: Path) -> None:
    (folder / "marked.toml").write_bytes("port = 0\n".encode("utf-8-sig"))
    assert end_of("config check", f"ML_CONFIG_FILE={value}", folder) == (Exit.OK, "")


def test_a_user_without_a_home_folder_has_one_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setenv("HOME", "set so that it is put back")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "home", unknown)
        ensure_home()
    assert os.environ["HOME"] == "/"
