"""`qualify` as a user runs it, with the engines of this machine on small models."""

import json
from pathlib import Path
from typing import Any

from doubles.tiny_models import FACES
from typer.testing import CliRunner

from immich_ml_metal.cli import app


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


def test_a_model_that_is_not_here_is_said_and_the_exit_code_too(
    tmp_path: Path, models: Path
) -> None:
    result = qualify(tmp_path, models, "ViT-L-14__openai")
    assert result.exit_code == 1
    assert "immich-ml-metal models pull ViT-L-14__openai" in result.output
