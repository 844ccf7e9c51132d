"""Models in a folder that belongs to another user: told by its path, and never a crash."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from doubles.snapshots import run
from doubles.tiny_models import FACES

from immich_ml_metal.cli import models_show
from immich_ml_metal.models.shelf import FileState

SRC = Path(__file__).parents[2] / "src"
FOLDER = "facial-recognition"
COMMANDS = ["list --task facial-recognition", "verify", f"info {FACES}", "prune --unused --yes"]


def test_every_state_of_a_file_has_a_colour() -> None:
    assert set(models_show._STYLE) == set(FileState)


@pytest.fixture
def loop(models: Path, tmp_path: Path) -> Path:
    """Face models behind a link to itself: nobody can read them, root neither."""
    shutil.copytree(models / "clip", tmp_path / "clip")
    (tmp_path / FOLDER).symlink_to(tmp_path / FOLDER)
    return tmp_path


@pytest.mark.parametrize(
    ("command", "code"), [*zip(COMMANDS, [0, 1, 0, 0], strict=True), ("verify --repair", 1)]
)
def test_a_command_names_the_folder_that_cannot_be_read_once(
    loop: Path, command: str, code: int
) -> None:
    said = run([*f"models {command} --models-dir".split(), str(loop)], {"ML_STATE_DIR": str(loop)})
    assert said.endswith(f"-- exit code {code}\n"), said
    assert said.partition("-- standard error")[2].count(f"{loop}/{FOLDER}: ") == 1, said
    assert ("unreadable" in said) is not command.startswith("prune")


RUN = """
import sys
from immich_ml_metal.cli import main
for command in sys.argv[2:]:
    try:
        main(["models", *command.split(), "--models-dir", sys.argv[1]])
    except SystemExit as end:
        print("exit", end.code, flush=True)
"""


@pytest.mark.parametrize("place", [FOLDER, f"{FOLDER}/{FACES}"])
def test_a_folder_of_another_user_is_told_with_permission_denied(
    models: Path, tmp_path: Path, place: str
) -> None:
    if os.geteuid() == 0 and shutil.which("setpriv") is None:
        pytest.skip("root reads everything, and there is no setpriv to make it otherwise")
    plain = ("setpriv", "--bounding-set=-dac_override,-dac_read_search")  # root sees every folder
    shutil.copytree(models / FOLDER, tmp_path / "m" / FOLDER)
    (tmp_path / "m" / place).chmod(0)
    program = (sys.executable, "-c", RUN, str(tmp_path / "m"))
    done = subprocess.run(
        [*(plain if os.geteuid() == 0 else ()), *program, *COMMANDS],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(SRC), "HOME": str(tmp_path), "COLUMNS": "200"},
        check=False,
    )
    (tmp_path / "m" / place).chmod(0o755)
    exits = [line for line in done.stdout.splitlines() if line.startswith("exit")]
    assert exits == ["exit 0", "exit 1", "exit 0", "exit 0"], done.stdout + done.stderr
    assert done.stderr.count(f"{tmp_path}/m/{place}: permission denied") == len(COMMANDS)
    assert (tmp_path / "m" / place).exists()


def test_the_doctor_survives_a_home_that_may_not_be_entered(tmp_path: Path) -> None:
    if os.geteuid() == 0 and shutil.which("setpriv") is None:
        pytest.skip("root reads everything, and there is no setpriv to make it otherwise")
    plain = ("setpriv", "--bounding-set=-dac_override,-dac_read_search")
    home = tmp_path / "home"
    home.mkdir(mode=0)
    program = (sys.executable, "-m", "immich_ml_metal", "doctor", "--no-test")
    done = subprocess.run(
        [*(plain if os.geteuid() == 0 else ()), *program],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(SRC), "HOME": str(home), "ML_OFFLINE": "1", "ML_PORT": "1"},
        check=False,
    )
    home.chmod(0o755)
    assert "their folder may not be entered" in done.stdout, done.stdout + done.stderr
    assert "Fix first: model folder" in done.stdout
    assert " warn  state folder" in done.stdout
