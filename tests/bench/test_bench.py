import io
import json
import os
import socket
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from doubles.live import serve
from doubles.tiny_models import FACES, OCR, draw_faces, draw_text
from rich.console import Console
from typer.testing import CliRunner

from immich_ml_metal.bench.load import (
    IN_FLIGHT,
    Form,
    Load,
    make_forms,
    run_import,
    run_load,
    run_once,
    run_search,
)
from immich_ml_metal.bench.machine import OtherWork, Processes
from immich_ml_metal.bench.measure import (
    SEARCH,
    WHOLE_IMPORT,
    Bench,
    BenchReport,
    Measured,
    Plan,
    Row,
    measure_all,
    ratios,
)
from immich_ml_metal.bench.raw import RawRate, _measure
from immich_ml_metal.cli import app
from immich_ml_metal.cli.bench import print_report
from immich_ml_metal.client.calls import BadAnswer, configured_names, immich_calls
from immich_ml_metal.errors import ServiceError
from immich_ml_metal.settings import Settings
from immich_ml_metal.threads import core_count
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
    arguments += ["--rounds", "2"]
    env = {"ML_OFFLINE": "1", "ML_OCR_MODEL": OCR}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("immich_ml_metal.bench.measure.IDLE_S", 0.1)
        result = CliRunner(env=env).invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "faces is not measured: antelopev2 is not in" in result.stderr.replace("\n", " ")
    printed: dict[str, Any] = json.loads(result.stdout)
    return printed


def test_a_task_is_measured_at_one_two_and_eight_clients_and_in_an_import(
    found: dict[str, Any],
) -> None:
    rows = found["ours"]["rows"]
    expected = [("text", 1), ("text", 2), ("text", 8), (WHOLE_IMPORT, IN_FLIGHT["text"])]
    assert [(row["name"], row["clients"]) for row in rows] == expected
    for load in (load for row in rows for load in row["loads"]):
        assert load["answers"] >= 1
        assert load["per_s"] > 0
        assert 0 < load["p50_ms"] <= load["p95_ms"]
        assert load["cpu_ms"] > 0
    assert all(len(row["loads"]) == found["rounds"] == 2 for row in rows)
    assert found["pictures"] == 2
    assert found["against"] is None
    assert found["ours"]["first_answer_s"] > 0
    assert 0 <= found["others_share"] <= 1


def test_memory_of_its_own_is_told_apart_from_what_is_mapped(found: dict[str, Any]) -> None:
    ours = found["ours"]
    assert 10 * 2**20 < ours["idle_private_bytes"] < ours["resident_bytes"] < 4 * 2**30
    assert ours["busy_private_bytes"] > 10 * 2**20


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


def measured(url: str, *rates: float, cpu_ms: float | None = 90.0) -> Measured:
    def row(name: str, clients: int) -> Row:
        loads = [Load(10, rate * clients, 20.0, 40.0, cpu_ms) for rate in rates]
        return Row(name, clients, loads)

    return Measured(url, [row("clip image", 1), row("clip image", 2), row(SEARCH, 1)])


def printed(
    ours: Measured, other: Measured | None, others_share: float = 0.02, width: int = 160
) -> str:
    words = io.StringIO()
    raw = [RawRate("clip image", "ViT-B-32__openai", 8.0)]
    report = BenchReport("a machine", 2, "1.0", 3, 3, raw, ours, other, others_share)
    print_report(report, Console(file=words, width=width))
    return words.getvalue()


def test_the_report_shows_medians_spread_and_ratios_of_rounds() -> None:
    ours, other = measured("http://ours", 6.0, 9.0, 5.0), measured("http://other", 4.0, 3.0, 5.0)
    ours.first_answer_s, ours.resident_bytes = 1.25, 300 * 2**20
    ours.idle_private_bytes, ours.busy_private_bytes = 110_000_000, 260_000_000
    text = printed(ours, other)
    for part in (
        "on a machine, 2 cores, 3 pictures, each request another one; medians of 3 rounds",
        "First answer 1.2 s after the start; memory of its own 110 MB when idle, 260 MB under",
        "Its memory and processor time are not seen from here.",
        "The machine was quiet",
    ):
        assert part in text
    ours_table, other_table, ratio_table = text.split("http://o")[1:4]
    assert "6.0 (5.0-9.0)" in ours_table
    assert "12.0 (10.0-18.0)" in ours_table
    assert "0.75" in ours_table, "six of eight a second of the raw engine"
    assert "4.0 (3.0-5.0)" in other_table
    assert ratio_table.count("1.50 (1.00-3.00)") == 2, "6/4, 9/3 and 5/5, not 6/4 of medians alone"
    assert SEARCH not in ratio_table, "its rate is the pace of the one who searches"


def test_a_narrow_terminal_cuts_no_figure() -> None:
    ours, other = measured("http://ours", 6.1, 911.2, 5.1), measured("http://other", 4.1, 3.1, 5.1)
    text = printed(ours, other, width=80)
    assert "…" not in text
    for part in ("911.2)", "1822.4)", "service/raw", "(1.00-293.94)"):
        assert part in text


def test_a_busy_machine_is_told() -> None:
    text = printed(measured("http://ours", 6.0), None, others_share=0.3)
    assert "Too busy to tell: other programs used 30 % of the cores meanwhile." in text
    assert "The machine was quiet" not in text


def test_ratios_are_of_one_round_each() -> None:
    (ours, *_), (theirs, *_) = measured("a", 2.0, 8.0).rows, measured("b", 1.0, 8.0).rows
    figure = ratios(ours, theirs)
    assert (figure.median, figure.low, figure.high) == (1.5, 1.0, 2.0)


def test_with_no_model_at_all_there_is_nothing_to_measure(tmp_path: Path, photos: Path) -> None:
    with pytest.raises(ServiceError, match="nothing to measure"):
        measure_all(small(tmp_path), Plan([photos], (1,), 0.1, 1, None, print))


def test_what_is_not_here_has_no_raw_rate(tmp_path: Path) -> None:
    assert _measure(small(tmp_path), 0.01) == []


def forms(models: Path, name: str, *payloads: bytes | str) -> list[Form]:
    return make_forms(immich_calls(configured_names(small(models)))[name], payloads)


async def test_a_closed_loop_sends_each_request_once_in_order(models: Path, service: str) -> None:
    requests = forms(models, "clip text", "dog", "cat", "sea")
    load = await run_once(service, requests, clients=2)
    assert load.answers == 3


async def test_every_request_brings_another_picture_that_looks_the_same(
    models: Path, service: str
) -> None:
    [form] = forms(models, "clip image", draw_text("abc"))
    first, second = form.body(), form.body()
    assert first != second
    assert len(first) == len(second)
    headers = {"content-type": form.content_type}
    async with httpx.AsyncClient() as client:
        answers = [
            await client.post(f"{service}/predict", content=body, headers=headers)
            for body in (first, second)
        ]
    assert answers[0].json() == answers[1].json()
    [text] = forms(models, "clip text", "dog")
    assert text.body() == text.body()
    assert text.content_type.startswith("multipart/form-data"), "as Immich sends a search"


async def test_an_import_takes_each_photo_through_every_task(models: Path, service: str) -> None:
    photo = draw_faces((160, 160))
    ready = {name: forms(models, name, photo) for name in ("clip image", "faces", "text")}
    before = answered(service)
    load = await run_import(service, ready, photos=4)
    assert load.answers == 4
    assert answered(service) - before == 12


def answered(service: str) -> int:
    """Tasks that the service answered, by its own count."""
    lines = httpx.get(f"{service}/metrics").text.splitlines()
    counts = [line for line in lines if line.startswith("immich_ml_requests_total{")]
    return sum(int(float(line.split()[-1])) for line in counts)


async def test_searches_are_timed_alone_while_an_import_runs_beside_them(
    models: Path, service: str
) -> None:
    queries = forms(models, "clip text", "dog", "cat")
    beside = {"text": forms(models, "text", draw_text("abc"))}
    before = answered(service)
    load = await run_search(service, queries, seconds=0.5, beside=beside)
    assert 1 <= load.answers < answered(service) - before


async def test_a_wrong_answer_stops_the_measurement_and_is_told(service: str) -> None:
    wrong = Form("application/x-www-form-urlencoded", b"entries=%7B%7D", b"", is_picture=False)
    with pytest.raises(BadAnswer, match=r"422: .*No model task requested"):
        await run_load(service, [wrong], clients=1, seconds=0.1)


async def test_a_service_that_is_not_there_is_told(models: Path) -> None:
    with serve(build_app(small(models))) as gone:
        pass
    with pytest.raises(ServiceError, match=gone):
        await run_once(gone, forms(models, "clip text", "a"), clients=1)


def test_two_services_are_measured_in_turn() -> None:
    seen: list[str] = []

    def measure(url: str) -> Load:
        seen.append(url)
        return Load(1, float(len(seen)), 1.0, 1.0)

    here = {"http://a": Processes(None)}
    bench = Bench(here, {}, Plan([], (), 1.0, 2, "http://b.invalid", lambda line: None))
    bench._in_turn("text", 1, measure)
    assert seen == ["http://a", "http://b.invalid"] * 2
    assert [[load.per_s for load in m.rows[0].loads] for m in bench.measured] == [[1, 3], [2, 4]]


def test_a_local_service_is_found_by_its_port_and_a_distant_one_is_not_looked_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        found = Processes.behind(f"http://127.0.0.1:{listener.getsockname()[1]}")
    assert (found.cpu_s() or 0) > 0
    assert (found.private_bytes() or 0) > 2**20
    for url in ("http://example.invalid:3003", "http://127.0.0.1:1"):
        assert Processes.behind(url).cpu_s() is None
        assert Processes.behind(url).private_bytes() is None


def test_what_other_programs_take_is_seen() -> None:
    spin = [
        sys.executable,
        "-c",
        "import time\nend = time.time() + 60\nwhile time.time() < end: pass",
    ]
    shell = [
        "sh",
        "-c",
        '"$@" >/dev/null 2>&1 & echo $!',
        "sh",
        *spin,
    ]  # ends, so it is nobody's child
    pid = int(subprocess.run(shell, check=True, capture_output=True, text=True).stdout)
    try:
        spinning, others = Processes(pid), OtherWork([])
        began_s, cpu_s = time.perf_counter(), spinning.cpu_s() or 0.0
        time.sleep(1.5)
        used_s = (spinning.cpu_s() or 0.0) - cpu_s
        spun = used_s / (time.perf_counter() - began_s) / core_count()
        assert spun > 0
        assert others.share() > spun / 2  # more where others work on this machine too
    finally:
        psutil.Process(pid).kill()


def test_what_we_take_is_not_counted_and_a_service_that_we_started_is_ours_only_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = {"ours": 10.0, "service": 20.0, "distant": 5.0, "machine": 100.0}
    me, child, other = os.getpid(), 1_000_001, 1_000_002
    by_pid = {
        me: lambda: {me: now["ours"], child: now["service"]},  # a child is among one's own
        child: lambda: {child: now["service"]},
        other: lambda: {other: now["distant"]},
    }
    times = namedtuple("times", "user idle")
    monkeypatch.setattr(Processes, "cpu_s_by_pid", lambda self: by_pid[self._pid]())
    monkeypatch.setattr(psutil, "cpu_times", lambda: times(now["machine"], 7.0))
    monkeypatch.setattr(time, "perf_counter", lambda: now["machine"])
    others = OtherWork([Processes(child), Processes(other)])
    now = {"ours": 11.0, "service": 22.0, "distant": 8.0, "machine": 110.0}
    assert others.share() == pytest.approx((10 - 1 - 2 - 3) / 10 / core_count())
