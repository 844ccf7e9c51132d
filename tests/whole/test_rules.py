"""The alert rules in Prometheus' own tools, and in a Prometheus that scrapes a real service."""

import asyncio
import json
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml  # type: ignore[import-untyped]
from doubles.gateway import GatewayProcess, free_port, gateway_process
from doubles.timing import PATIENCE_S

RULES = Path(__file__).parents[2] / "deploy" / "prometheus-alerts.yml"
PROMTOOL, PROMETHEUS = shutil.which("promtool"), shutil.which("prometheus")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed")
needs_prometheus = pytest.mark.skipif(PROMETHEUS is None, reason="prometheus is not installed")

PREDICT = 'immich_ml_http_requests_total{job="j",instance="i",path="/predict",process="gateway"'
PAUSED = 'immich_ml_paused_queues{job="j",instance="i",process="gateway",queue="ocr"}'
ENDED = 'immich_ml_unplanned_end_timestamp_seconds{job="j",instance="i",process="gateway"}'
LOADS = 'immich_ml_model_loads_total{job="j",instance="i",model="m",outcome="failed"}'
# alert → a series, its values once a minute, the first minute at which it fires
CASES = {
    "ImmichMlAnswersFailed": (PREDICT + ',status="503"}', "0 0 0 1 1 1 1", 3),
    "ImmichMlAnswersRefused": (PREDICT + ',status="400"}', "0 0 0 1 1 1 1", 3),
    "ImmichMlQueuePaused": (PAUSED, "0 0 0 " + "1 " * 20, 18),
    "ImmichMlUnplannedEnd": (ENDED, "0+0x90 5400+0x30", 91),
    "ImmichMlModelDoesNotLoad": (LOADS, "_ _ _ _ 1 1 1 1", 4),
}


@needs_promtool
def test_promtool_takes_the_rules() -> None:
    done = subprocess.run(
        [str(PROMTOOL), "check", "rules", str(RULES)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
@pytest.mark.parametrize("alert", CASES)
def test_an_alert_fires_at_the_first_case_and_not_before(alert: str, tmp_path: Path) -> None:
    series, values, minute = CASES[alert]
    rule = next(
        rule
        for rule in yaml.safe_load(RULES.read_text())["groups"][0]["rules"]
        if rule["alert"] == alert
    )
    checks = [
        {"alertname": alert, "eval_time": f"{minute - 1}m", "exp_alerts": []},
        {"alertname": alert, "eval_time": f"{minute}m", "exp_alerts": []},
    ]
    unit: dict[str, Any] = {
        "rule_files": [str(RULES)],
        "tests": [
            {
                "interval": "1m",
                "input_series": [{"series": series, "values": values}],
                "alert_rule_test": checks,
            }
        ],
    }
    (tmp_path / "test.yml").write_text(yaml.safe_dump(unit))
    done = subprocess.run(
        [str(PROMTOOL), "test", "rules", str(tmp_path / "test.yml")],
        capture_output=True,
        text=True,
        check=False,
    )
    said = done.stdout + done.stderr
    # Silent a minute earlier, so the only complaint is that it fires now.
    assert f"time: {clock(minute - 1)}," not in said
    assert f"time: {clock(minute)}," in said, said
    assert f'severity="{rule["labels"]["severity"]}"' in said


def clock(minute: int) -> str:
    """As promtool writes it: 1h31m."""
    hours, minutes = divmod(minute, 60)
    return f"{hours}h{minutes}m" if hours else f"{minutes}m"


def panel_queries() -> list[str]:
    panels = json.loads((RULES.parent / "grafana-dashboard.json").read_text())["panels"]
    queries = [target["expr"] for panel in panels for target in panel.get("targets", [])]
    return [q.replace("$job", ".*").replace("$__rate_interval", "1m") for q in queries]


@asynccontextmanager
async def prometheus(folder: Path, target: str) -> AsyncIterator[httpx.AsyncClient]:
    """A Prometheus that scrapes `target` every second and evaluates our rules as often."""
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(RULES)],
        "scrape_configs": [{"job_name": "j", "static_configs": [{"targets": [target]}]}],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    port = free_port()
    process = await asyncio.create_subprocess_exec(
        str(PROMETHEUS),
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}/api/v1") as client:
            yield client
    finally:
        process.terminate()
        await process.wait()


async def ask(client: httpx.AsyncClient, query: str) -> list[dict[str, Any]]:
    try:
        answer = await client.get("/query", params={"query": query})
    except httpx.HTTPError:
        return []
    result: list[dict[str, Any]] = answer.json()["data"]["result"] if answer.is_success else []
    return result


async def seen(client: httpx.AsyncClient, query: str) -> list[dict[str, Any]]:
    for _ in range(int(PATIENCE_S / 0.2)):
        if result := await ask(client, query):
            return result
        await asyncio.sleep(0.2)
    raise AssertionError(f"Prometheus never had {query}")


@needs_prometheus
async def test_a_real_prometheus_sees_the_first_failure_of_a_real_service(tmp_path: Path) -> None:
    gateway: GatewayProcess
    async with gateway_process(tmp_path) as gateway:
        target = gateway.client.base_url.netloc.decode()
        async with prometheus(tmp_path, target) as client:
            await seen(client, 'count_over_time(immich_ml_worker_up{process="gateway"}[5m]) > 2')
            assert await ask(client, 'ALERTS{alertname=~".*Answers.*"}') == []
            await gateway.client.post("/predict", content=b"[status 500]")
            await gateway.client.post("/predict", content=b"[status 400]")
            await seen(client, 'ALERTS{alertname="ImmichMlAnswersFailed",alertstate="firing"}')
            await seen(client, 'ALERTS{alertname="ImmichMlAnswersRefused",alertstate="firing"}')
            assert await ask(client, 'ALERTS{alertname="ImmichMlQueuePaused"}') == []
            for query in panel_queries():
                answer = await client.get("/query", params={"query": query})
                assert answer.is_success, (query, answer.text)
            assert await seen(client, panel_queries()[1])
