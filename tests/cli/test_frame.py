"""What holds for every command: it is listed, explains itself, and costs nothing until it runs."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from immich_ml_metal.cli import app

COMMANDS = ("serve", "demo", "doctor", "parity", "bench", "config", "service", "immich", "version")
HEAVY = ("numpy", "onnxruntime", "onnx", "cv2", "httpx", "fastapi", "uvicorn", "psutil", "PIL")


def test_help_lists_every_command() -> None:
    text = CliRunner(env={"COLUMNS": "120"}).invoke(app, ["--help"]).stdout
    assert [name for name in COMMANDS if f" {name} " not in text] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_explains_itself(name: str) -> None:
    result = CliRunner(env={"COLUMNS": "120"}).invoke(app, [name, "--help"])
    assert result.exit_code == 0
    assert f"immich-ml-metal {name}" in result.stdout or f"{name} [OPTIONS]" in result.stdout


@pytest.mark.parametrize("name", ["doctor", "parity", "immich status", "immich requeue"])
def test_exit_codes_are_told_by_the_help(name: str) -> None:
    text = CliRunner(env={"COLUMNS": "120"}).invoke(app, [*name.split(), "--help"]).stdout
    assert "Exit code: 0" in text


def test_the_command_line_loads_no_heavy_library() -> None:
    code = "import immich_ml_metal.cli, sys, json; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert [name for name in HEAVY if name in json.loads(done.stdout)] == []
