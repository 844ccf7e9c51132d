"""The whole service on this Mac: idle stop and restart, throughput, and a life under launchd."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from doubles.live import ALL, TEXTUAL, VISUAL, predict
from doubles.tiny_models import draw_faces, draw_text

from immich_ml_metal.client.own_service import running_service

pytestmark = [pytest.mark.apple, pytest.mark.timeout(600)]
RUNS_ON_LINUX = False


def test_the_worker_stops_when_idle_and_answers_again(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ML_MODEL_TTL", "2")
    monkeypatch.setenv("ML_OFFLINE", "1")
    with running_service({"--models-dir": str(models)}) as own:
        before = predict(own.url, TEXTUAL, text="dog").json()
        end_s = time.monotonic() + 60
        while httpx.get(f"{own.url}/health").json()["worker"]["state"] != "idle":
            assert time.monotonic() < end_s, "the worker never stopped"
            time.sleep(0.5)
        assert predict(own.url, TEXTUAL, text="dog").json() == before
        assert httpx.get(f"{own.url}/health").json()["worker_starts"] == 2


def test_throughput(
    shared_models: Path, monkeypatch: pytest.MonkeyPatch, report: Callable[[str], None]
) -> None:
    monkeypatch.setenv("ML_OFFLINE", "1")
    pictures = [draw_faces((160, 16 * n)) for n in range(10, 18)]
    with running_service({"--models-dir": str(shared_models)}, start_timeout_s=120) as own:
        for entries, image in ((VISUAL, pictures[0]), (ALL, draw_text("abc"))):
            predict(own.url, entries, image=image)  # loads
        start_s = time.perf_counter()
        with ThreadPoolExecutor(8) as clients:
            answers = list(
                clients.map(lambda n: predict(own.url, VISUAL, image=pictures[n % 8]), range(64))
            )
        took_s = time.perf_counter() - start_s
        engines = httpx.get(f"{own.url}/health").json()["worker"]["health"]["engines"]
    assert {answer.status_code for answer in answers} == {200}
    report(f"search pictures at 8 clients: {64 / took_s:.1f} per second on {engines}")


def test_a_life_under_launchd(models: Path, tmp_path: Path) -> None:
    """Install, answer, restart, uninstall: as the user's own agent, which must not be there yet."""
    command = [sys.executable, "-m", "immich_ml_metal"]

    def service(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, "service", *words],
            env=os.environ | {"HOME": str(Path("~").expanduser())},
            capture_output=True,
            text=True,
            check=False,
            timeout=200,
        )

    agent = Path(f"/Users/{os.environ.get('USER', '')}/Library/LaunchAgents")
    if any(agent.glob("immich-ml-metal*")):
        pytest.skip("the service is installed here already: it is left alone")
    config = tmp_path / "config.toml"
    config.write_text(f'models_dir = "{models}"\noffline = true\nport = 3919\nhost = "127.0.0.1"\n')
    try:
        done = service("install", "--config", str(config))
        assert done.returncode == 0, done.stdout + done.stderr
        wait_for_ping("http://127.0.0.1:3919")
        assert predict("http://127.0.0.1:3919", TEXTUAL, text="dog").status_code == 200
        assert service("restart").returncode == 0
        wait_for_ping("http://127.0.0.1:3919")
    finally:
        service("uninstall")
    with pytest.raises(httpx.TransportError):
        httpx.get("http://127.0.0.1:3919/ping")


def wait_for_ping(url: str) -> None:
    end_s = time.monotonic() + 90
    while True:
        try:
            if httpx.get(f"{url}/ping").status_code == 200:
                return
        except httpx.TransportError:
            pass
        assert time.monotonic() < end_s, f"nobody answers at {url}"
        time.sleep(0.5)
