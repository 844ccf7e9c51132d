"""Two replicas behind Ray Serve, under load, one of them killed: nothing is lost."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
from doubles.gateway import free_port
from doubles.live import face_entries, predict
from doubles.tiny_models import draw_faces
from prometheus_client.parser import text_string_to_metric_families

pytest.importorskip("ray.serve", reason="ray is an extra: pip install 'ray[serve]'")

DEPLOY = Path(__file__).parents[2] / "deploy"
MAIN = """
import signal, sys, ray
from ray import serve
ray.init(num_cpus=4, include_dashboard=False)
serve.start(http_options={"port": int(sys.argv[1])})
from ray_serve import service
serve.run(service)
print("up", flush=True)
signal.pause()
"""
CLIENTS = 8
REPLICA = re.compile(r"ray::ServeReplica:default:immich-ml(\.\w+)?")


@pytest.fixture
def cluster(models: Path, tmp_path: Path) -> Iterator[tuple[str, int]]:
    """Ray on this machine with two replicas; gives its address and process."""
    port = free_port()
    env = {**os.environ, "PYTHONPATH": str(DEPLOY), "REPLICAS": "2", "ML_OFFLINE": "1"}
    env |= {"ML_MODELS_DIR": str(models), "ML_STATE_DIR": str(tmp_path), "ML_INDEX_GUARD": "off"}
    command = [sys.executable, "-c", MAIN, str(port)]
    log = (tmp_path / "log").open("w+")
    child = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 100
        while "\nup" not in (said := Path(log.name).read_text()):
            assert child.poll() is None, said
            assert time.monotonic() < deadline, said
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}", child.pid
    finally:
        child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        log.close()


def replicas(pid: int) -> list[psutil.Process]:
    found = psutil.Process(pid).children(recursive=True)
    titled = [(process, " ".join(process.cmdline()).strip()) for process in found]
    return [process for process, title in titled if REPLICA.fullmatch(title)]


def answered(url: str) -> Counter[str]:
    """Requests answered with 200 by each replica."""
    text = httpx.get(f"{url}/metrics", timeout=60).text
    counts: Counter[str] = Counter()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            is_ours = sample.name == "immich_ml_requests_total"
            if is_ours and sample.labels["status"] == "200":
                counts[sample.labels["process"]] += int(sample.value)
    return counts


@pytest.mark.timeout(300)
def test_a_replica_that_is_killed_under_load_costs_no_request(cluster: tuple[str, int]) -> None:
    url, pid = cluster
    image, entries = draw_faces((160, 160)), face_entries()
    before = sum(predict(url, entries, image=image).is_success for _ in range(12))
    by_replica = answered(url)
    assert len(by_replica) == 2
    assert sum(by_replica.values()) == before == 12

    victim, other = replicas(pid)

    def ask(_: int) -> int:
        return predict(url, entries, image=image).status_code

    with ThreadPoolExecutor(CLIENTS) as pool:
        asked = [pool.submit(ask, number) for number in range(200)]
        asked[20].result()
        victim.suspend()  # in the middle of what it has taken on
        time.sleep(3)
        assert not all(one.done() for one in asked)
        victim.kill()
        statuses = Counter(one.result() for one in asked)
    assert statuses == {200: 200}
    assert other.is_running()
