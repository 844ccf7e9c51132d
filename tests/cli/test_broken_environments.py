"""Commands where the environment is broken: the documented exit code, and never a crash."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from doubles.hub import FakeHub
from doubles.snapshots import run
from doubles.tiny_models import CLIP, FACES, OCR

from immich_ml_metal.cli.output import Exit

CRASH = re.compile(r"Traceback|KeyError|Error: <|ML_LOG_LEVEL=debug shows where")
# What each command ends with where nothing but the environment is wrong.
COMMANDS = {
    "version": Exit.OK,
    "config check": Exit.OK,
    "config show": Exit.OK,
    "models list": Exit.OK,
    f"models info {FACES}": Exit.OK,
    "models verify": Exit.OK,
    "models prune": Exit.OK,
    "models recommend": Exit.OK,
    "models pull antelopev2": Exit.UNREACHABLE,
    "immich status": Exit.USAGE,  # no address is set
    "immich requeue": Exit.USAGE,
    "immich release": Exit.USAGE,
    "service status": Exit.FINDING,  # none is installed
    "service logs": Exit.FINDING,
    "service uninstall": Exit.OK,
    "service install --print": Exit.OK,
    f"parity --against http://127.0.0.1:9 {Path(__file__).parent}": Exit.UNREACHABLE,
    "bench /nowhere.png": Exit.USAGE,
    "qualify no-such-model": Exit.FINDING,
    "models verify no-such-model": Exit.FINDING,
    "demo /nowhere.png": Exit.USAGE,
}
BROKEN = {
    "ML_STATE_DIR": "/proc/x",
    "ML_MODELS_DIR": "FILE",
    "SSL_CERT_FILE": "/none",
    "ALL_PROXY": "socks5://127.0.0.1:9",
    "TMPDIR": "/none",
    "ML_CONFIG_FILE": "/etc",
    "HF_TOKEN": "hf_ä",
}


def broken(variable: str, folder: Path) -> str:
    """Its bad value; FILE stands for a file, where a folder is wanted."""
    (folder / "file").write_bytes(b"")
    return BROKEN[variable].replace("FILE", str(folder / "file"))


@pytest.fixture
def sound(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Settings with which every command does what it can without a network."""
    monkeypatch.setattr(tempfile, "tempdir", None)  # else TMPDIR was read long ago
    names = {"ML_CLIP_MODEL": CLIP, "ML_FACE_MODEL": FACES, "ML_OCR_MODEL": OCR}
    home = {"HOME": str(tmp_path), "ML_STATE_DIR": str(tmp_path / "state"), "ML_PORT": "1"}
    return {"ML_MODELS_DIR": str(models), **names, **home}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("variable", BROKEN)
def test_a_command_ends_as_documented_in_a_broken_environment(
    variable: str, command: str, sound: dict[str, str], tmp_path: Path
) -> None:
    said = run(command.split(), {**sound, variable: broken(variable, tmp_path)})
    code = COMMANDS[command]
    if variable == "ML_CONFIG_FILE" and command != "version":
        code = Exit.USAGE
        assert "/etc" in said or "/nowhere" in command  # that is seen first
    assert said.endswith(f"-- exit code {code:d}\n"), said
    assert CRASH.search(said) is None, said


@pytest.mark.parametrize("variable", BROKEN)
def test_the_doctor_itself_survives_a_broken_environment(
    variable: str, sound: dict[str, str], tmp_path: Path
) -> None:
    said = run(["doctor", "--no-test"], {**sound, variable: broken(variable, tmp_path)})
    assert re.search(r"-- exit code [01]\n$", said), said  # 1: what is broken is told
    assert CRASH.search(said) is None, said


@pytest.mark.parametrize(
    ("variable", "code", "words"),
    [
        ("ML_STATE_DIR", Exit.OK, "fetched  buffalo_s/recognition"),
        ("ML_MODELS_DIR", Exit.UNREACHABLE, "/file/.locks/.*: Not a directory"),
        ("SSL_CERT_FILE", Exit.UNREACHABLE, "SSL_CERT_FILE=/none does not exist"),
        ("ALL_PROXY", Exit.UNREACHABLE, "ALL_PROXY names a SOCKS proxy"),
        ("TMPDIR", Exit.OK, "fetched  buffalo_s/recognition"),
        ("ML_CONFIG_FILE", Exit.USAGE, "/etc: Is a directory"),
        ("HF_TOKEN", Exit.UNREACHABLE, "HF_TOKEN is not a token"),
    ],
)
def test_a_download_in_a_broken_environment_arrives_or_names_what_is_broken(
    variable: str, code: int, words: str, hub: FakeHub, sound: dict[str, str], tmp_path: Path
) -> None:
    online = {"ML_OFFLINE": "0", "HF_ENDPOINT": hub.url, "ML_MODELSCOPE_ENDPOINT": hub.url}
    online |= {"ML_MODELS_DIR": str(tmp_path / "models")}
    online |= {variable: broken(variable, tmp_path)}
    said = run(["models", "pull", "buffalo_s"], sound | online)
    assert said.endswith(f"-- exit code {code:d}\n"), said
    assert re.search(words, said), said
    assert CRASH.search(said) is None, said


@pytest.mark.parametrize(
    ("command", "code"), [("version", 0), ("models list", 0), ("config check", 0)]
)
def test_a_command_ends_as_documented_without_a_standard_output(
    command: str, code: int, sound: dict[str, str]
) -> None:
    done = subprocess.run(
        ["sh", "-c", 'exec "$0" -m immich_ml_metal "$@" >&-', sys.executable, *command.split()],
        stderr=subprocess.PIPE,
        text=True,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(sys.path), **sound},
        check=False,
    )
    assert (done.returncode, CRASH.search(done.stderr)) == (code, None), done.stderr
