"""Output that nobody takes and Ctrl-C: a documented exit code, and nothing of Python's own."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from doubles.snapshots import run
from doubles.tiny_models import FACES

from immich_ml_metal import __main__
from immich_ml_metal.cli.output import Exit

PRINTING = ["version", "--help", "config show", "models list --json", "models verify"]
FULL = "immich-ml-metal: standard output: the disk is full\n"


def end_of(command: str, streams: str, models: Path, folder: Path) -> tuple[int, str]:
    """How a command ends whose streams a shell has redirected so, and its standard error."""
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(sys.path)}
    env |= {"HOME": str(folder), "ML_OFFLINE": "1", "ML_MODELS_DIR": str(models)}
    program = [sys.executable, "-m", "immich_ml_metal", *command.split()]
    shell = ["bash", "-c", f'"$0" "$@" {streams}; exit ${{PIPESTATUS[0]}}']
    done = subprocess.run([*shell, *program], capture_output=True, text=True, env=env, timeout=60)
    return done.returncode, done.stderr


@pytest.mark.parametrize("command", PRINTING)
def test_a_reader_that_went_ends_a_command_without_a_word(
    command: str, models: Path, tmp_path: Path
) -> None:
    assert end_of(command, "| exec true", models, tmp_path) == (Exit.READER_GONE, "")


@pytest.mark.parametrize("command", PRINTING)
def test_a_full_disk_under_the_output_is_told_once(
    command: str, models: Path, tmp_path: Path
) -> None:
    assert end_of(command, "> /dev/full", models, tmp_path) == (Exit.FINDING, FULL)


@pytest.mark.parametrize("streams", [">&-", "2>&-", "2>/dev/full", "2> >(exec true)"])
@pytest.mark.parametrize(
    ("command", "code"), [("models verify", Exit.OK), ("models info none", Exit.FINDING)]
)
def test_a_command_ends_as_ever_where_its_words_are_lost(
    command: str, code: Exit, streams: str, models: Path, tmp_path: Path
) -> None:
    ended, said = end_of(command, streams, models, tmp_path)
    assert ended == code
    assert "Traceback" not in said
    assert "ignored" not in said


def test_ctrl_c_at_a_question_is_no_answer_to_it(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(question: str) -> str:
        assert question.startswith("Delete these, ")
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupted)
    env = {"ML_MODELS_DIR": str(models), "HOME": str(tmp_path)}
    said = run(["models", "rm", FACES], env)
    assert said.endswith(f"-- exit code {Exit.INTERRUPTED:d}\n"), said
    assert "Abort" not in said


class _Interrupted(ModuleType):
    """A module at whose import somebody presses Ctrl-C."""

    def __getattr__(self, name: str) -> object:
        raise KeyboardInterrupt


def test_ctrl_c_while_the_program_is_loaded_ends_it_in_silence(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "immich_ml_metal.cli", _Interrupted("immich_ml_metal.cli"))
    with pytest.raises(SystemExit) as end:
        __main__.main()
    assert end.value.code == Exit.INTERRUPTED
    assert capfd.readouterr() == ("", "")
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    scripts = project["project"]["scripts"]
    assert scripts == {"immich-ml-metal": "immich_ml_metal.__main__:main"}
