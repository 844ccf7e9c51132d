"""`qualify` as a user runs it, with the engines of this machine on small models."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import psutil
from doubles.tiny_models import CLIP, FACES, OCR
from typer.testing import CliRunner

from immich_ml_metal.cli import app
from immich_ml_metal.errors import UnknownModel


def qualify(home: Path, models: Path, *args: str) -> Any:
    env = {
        "HOME": str(home),
        "COLUMNS": "200",
        "ML_OFFLINE": "1",
        "ML_MODELS_DIR": str(models),
        "ML_STATE_DIR": str(home / "state"),
    }
    return CliRunner(env=env).invoke(app, ["qualify", *args])


def test_the_table_shows_each_candidate_and_the_second_time_measures_nothing(
    tmp_path: Path, models: Path
) -> None:
    report = tmp_path / "report.md"
    first = qualify(tmp_path, models, FACES, "--share", str(report))
    assert first.exit_code == 0, first.output
    assert f"{FACES}/detection: cpu float32 (portable default, the reference)" in first.stdout
    assert "right: the reference" in first.stdout
    assert f"## {FACES}/recognition" in report.read_text()
    second = json.loads(qualify(tmp_path, models, FACES, "--json").stdout)
    stored = json.loads((tmp_path / "state" / "engines.json").read_text())["models"]
    for one in second:
        kept = stored[one["model"]]["verdicts"]["cpu float32"]["figures"]
        assert one["candidates"]["cpu float32"]["figures"] == kept


def test_a_shared_report_keeps_its_table_and_tells_nothing_of_its_owner(
    tmp_path: Path, models: Path
) -> None:
    home, report = tmp_path / "jane", tmp_path / "report.md"
    assert qualify(home, models, FACES).exit_code == 0
    stored = home / "state" / "engines.json"
    document = json.loads(stored.read_text())
    private = f"no {models}/a.onnx, {home}/b at {socket.gethostname()}, /Users/jane/c"
    for one in document["models"].values():
        one["verdicts"]["cpu float32"]["reason"] = f"{private} | half\nof it"
    stored.write_text(json.dumps(document))
    assert qualify(home, models, FACES, "--share", str(report)).exit_code == 0
    text = report.read_text()
    for word in (str(models), str(home), socket.gethostname(), "jane"):
        assert word not in text
    assert text.count(r"\| half of it |") == 2
    assert f"onnxruntime {onnxruntime.__version__}" in text


def test_a_model_that_is_not_here_is_said_and_the_exit_code_too(
    tmp_path: Path, models: Path
) -> None:
    result = qualify(tmp_path, models, "ViT-L-14__openai")
    assert result.exit_code == 1
    assert "immich-ml-metal models pull ViT-L-14__openai" in result.output


def test_a_name_that_is_no_model_is_refused_before_anything_is_measured(
    tmp_path: Path, models: Path
) -> None:
    result = qualify(tmp_path, models, FACES, "no-such-model")
    assert isinstance(result.exception, UnknownModel)
    assert not (tmp_path / "state").exists()


def test_ctrl_c_ends_the_probe_and_keeps_what_was_measured(tmp_path: Path, models: Path) -> None:
    env = {**os.environ, "ML_OFFLINE": "1", "ML_MODELS_DIR": str(models)}
    env["ML_STATE_DIR"] = str(tmp_path / "state")
    stored = tmp_path / "state" / "engines.json"
    command = [sys.executable, "-m", "immich_ml_metal", "qualify", FACES, OCR, CLIP]
    process = subprocess.Popen(
        command, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        wait_for(lambda: "outcome" in stored.read_text() if stored.exists() else False)
        wait_for(lambda: bool(psutil.Process(process.pid).children()))
        probes = psutil.Process(process.pid).children()
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in said
    wait_for(lambda: not any(probe.is_running() for probe in probes))
    kept = json.loads(stored.read_text())["models"]
    assert kept[f"facial-recognition/detection/{FACES}"]["verdicts"]


def wait_for(condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.02)
