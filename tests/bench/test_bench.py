import io
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from doubles.live import serve
from doubles.tiny_models import FACES, OCR, draw_faces, draw_text
from rich.console import Console
from typer.testing import CliRunner

from immich_ml_metal.bench.measure import (
    BenchReport,
    Load,
    Measured,
    Plan,
    in_turn,
    measure_all,
    run_load,
    run_once,
)
from immich_ml_metal.bench.raw import RawRate, _measure
from immich_ml_metal.cli import app
from immich_ml_metal.cli.bench import print_report
from immich_ml_metal.client.calls import BadAnswer, configured_names, encode, immich_calls
from immich_ml_metal.errors import ServiceError
from immich_ml_metal.settings import Settings
from immich_ml_metal.worker.compose import build_app


def small(models: Path) -> Settings:
    return Settings(models_dir=models, offline=True, face_model=FACES, ocr_model=OCR)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    (folder / "a.png").write_bytes(draw_faces((160, 160)))
    (folder / "b.png").write_bytes(draw_text("abc"))
    (folder / "album").mkdir()
    return folder


@pytest.fixture(scope="module")
def found(models: Path, photos: Path) -> dict[str, Any]:
    """What the command prints for scripts; only the text model is here, to be quick."""
    arguments = ["bench", str(photos), "--models-dir", str(models), "--seconds", "0.5", "--json"]
    arguments += ["--clip-model", "ViT-L-14__openai", "--face-model", "antelopev2"]
    env = {"ML_OFFLINE": "1", "ML_OCR_MODEL": OCR}
    result = CliRunner(env=env).invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "faces is not measured: antelopev2 is not in" in result.stderr.replace("\n", " ")
    printed: dict[str, Any] = json.loads(result.stdout)
    return printed


def test_a_task_is_measured_at_one_two_and_eight_clients(found: dict[str, Any]) -> None:
    ours = found["ours"]
    assert list(ours["loads"]) == ["text"]
    for loads in (ours["loads"]["text"], ours["imports"]):
        assert [load["clients"] for load in loads] == [1, 2, 8]
        assert all(load["answers"] >= 1 and load["per_s"] > 0 for load in loads)
        assert all(0 < load["p50_ms"] <= load["p95_ms"] for load in loads)
    assert found["pictures"] == 2
    assert found["against"] is None
    assert ours["first_answer_s"] > 0
    assert 10 * 2**20 < ours["resident_bytes"] < 4 * 2**30


def test_the_raw_engine_is_measured_on_the_same_files(found: dict[str, Any]) -> None:
    names = [(rate["task"], rate["model"]) for rate in found["raw"]]
    assert names == [("text detection", OCR), ("text recognition", OCR)]
    assert all(rate["per_s"] > 0 for rate in found["raw"])


def test_every_half_of_every_task_has_a_raw_rate(models: Path) -> None:
    rates = _measure(small(models), 0.02)
    assert [rate.task for rate in rates] == [
        "clip image",
        "clip text",
        "face detection",
        "face recognition",
        "text detection",
        "text recognition",
    ]
    assert all(rate.per_s > 0 for rate in rates)


def measured(url: str, per_s: float) -> Measured:
    loads = [Load(count, 10, per_s * count, 20.0, 40.0) for count in (1, 2)]
    return Measured(url, {"clip image": loads}, loads)


def test_the_report_shows_figures_and_ratios() -> None:
    ours, other = measured("http://ours", 6.0), measured("http://other", 4.0)
    ours.first_answer_s, ours.resident_bytes = 1.25, 300 * 2**20
    raw = [RawRate("clip image", "ViT-B-32__openai", 8.0)]
    words = io.StringIO()
    report = BenchReport("a machine", 2, "1.0", 3, raw, ours, other)
    print_report(report, Console(file=words, width=160))
    text = words.getvalue()
    for part in (
        "on a machine, 2 cores, 3 pictures",
        "ViT-B-32__openai",
        "whole import, photos",
        "Ours / http://other",
        "First answer 1.2 s after the start; resident memory after all tasks 300 MiB",
    ):
        assert part in text
    rows = [line.split("│") for line in text.splitlines() if "clip image" in line]
    assert [  # service/raw at one client, ours at two, theirs at one
        next(row for row in rows if "6.0" in row[3])[6].strip(),
        next(row for row in rows if "12.0" in row[3])[6].strip(),
        next(row for row in rows if "4.0" in row[3])[6].strip(),
    ] == ["0.75", "1.50", "0.50"]
    assert text.count("1.50") >= 2  # ours / theirs


def test_with_no_model_at_all_there_is_nothing_to_measure(tmp_path: Path, photos: Path) -> None:
    with pytest.raises(ServiceError, match="nothing to measure"):
        measure_all(small(tmp_path), Plan([photos], (1,), 0.1, None, print))


def test_what_is_not_here_has_no_raw_rate(tmp_path: Path) -> None:
    assert _measure(small(tmp_path), 0.01) == []


async def test_a_closed_loop_sends_each_request_once_in_order(models: Path, service: str) -> None:
    call = immich_calls(configured_names(small(models)))["clip text"]
    requests = [encode(call, text) for text in ("dog", "cat", "sea")]
    load = await run_once(service, requests, clients=2)
    assert (load.clients, load.answers) == (2, 3)


async def test_a_wrong_answer_stops_the_measurement_and_is_told(service: str) -> None:
    request = httpx.Request("POST", service, data={"entries": "{}"})
    request.read()
    with pytest.raises(BadAnswer, match=r"422: .*No model task requested"):
        await run_load(service, [request], clients=1, seconds=0.1)


async def test_a_service_that_is_not_there_is_told(models: Path) -> None:
    with serve(build_app(small(models))) as gone:
        pass
    request = encode(immich_calls(configured_names(small(models)))["clip text"], "a")
    with pytest.raises(ServiceError, match=gone):
        await run_once(gone, [request], clients=1)


def test_two_services_are_measured_in_turn_and_the_better_of_each_counts() -> None:
    seen: list[str] = []

    def measure(url: str) -> Load:
        seen.append(url)
        return Load(1, 1, per_s=float(len(seen)), p50_ms=1.0, p95_ms=1.0)

    found = in_turn([Measured("a"), Measured("b")], measure)
    assert seen == ["a", "b", "a", "b"]
    assert [load.per_s for load in found] == [3.0, 4.0]
    assert [load.per_s for load in in_turn([Measured("a")], measure)] == [5.0]
