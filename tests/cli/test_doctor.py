"""The doctor command as a user runs it, against our own engine on small models."""

from pathlib import Path
from typing import Any

from doubles.tiny_models import CLIP, FACES, OCR
from typer.testing import CliRunner

from immich_ml_metal.cli import app


def doctor(home: Path, models: Path, *args: str, **env: str) -> Any:
    environment = {
        "HOME": str(home),
        "COLUMNS": "140",
        "ML_OFFLINE": "1",
        "ML_MODELS_DIR": str(models),
        "ML_CLIP_MODEL": CLIP,
        "ML_FACE_MODEL": FACES,
        "ML_OCR_MODEL": OCR,
        **env,
    }
    return CliRunner(env=environment).invoke(app, ["doctor", *args])


# The small text model knows three letters, so it reads nothing of the drawn picture: that doctor
# says so, and nothing of the other tasks, shows that it really asked.
READ_NOTHING = "FAIL  engines        text on cpu: it read nothing"


def test_a_running_service_is_asked_for_real(tmp_path: Path, models: Path, service: str) -> None:
    result = doctor(tmp_path, models, ML_PORT=service.rpartition(":")[2])
    assert READ_NOTHING in result.stdout, result.output
    assert "is installed and serving" in result.stdout
    for name in (CLIP, FACES, OCR):
        assert name in result.stdout


def test_without_a_service_one_is_started_for_the_test(tmp_path: Path, models: Path) -> None:
    result = doctor(tmp_path, models, ML_PORT="1")
    assert READ_NOTHING in result.stdout, result.output
    assert "1 is free; the service is not running" in result.stdout


def test_the_cause_stands_on_top_with_its_fix(tmp_path: Path) -> None:
    result = doctor(tmp_path, tmp_path / "none", "--no-test", ML_PORT="1")
    top = result.stdout.splitlines()
    assert result.exit_code == 1
    assert top[0] == "Fix first: hub"
    assert "ML_OFFLINE" in top[2]
    assert "follows from hub" in result.stdout


def test_an_immich_that_cannot_be_asked_is_a_failure_without_its_key(
    tmp_path: Path, models: Path
) -> None:
    immich = {"ML_IMMICH_URL": "http://127.0.0.1:1", "ML_IMMICH_API_KEY": "tell-nobody"}
    result = doctor(tmp_path, models, "--no-test", ML_PORT="1", **immich)
    assert result.exit_code == 1
    assert "Fix first: immich" in result.stdout
    assert "tell-nobody" not in result.output


def test_every_file_is_read_on_demand(tmp_path: Path, models: Path) -> None:
    result = doctor(tmp_path, models, "--no-test", "--verify", ML_PORT="1")
    assert f"ok    models         {CLIP}, {FACES}, {OCR}" in result.stdout, result.output
