"""The gateway as a process of its own: its start, its size, its signals, its death."""

import asyncio
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from doubles.gateway import (
    MAIN,
    free_port,
    gateway_process,
    is_alive,
    right_answer,
    running_gateway,
    settings,
)
from doubles.timing import until

from immich_ml_metal.system.footprint import memory_bytes


async def test_the_worker_ends_when_the_gateway_is_killed(tmp_path: Path) -> None:
    async with gateway_process(tmp_path) as gateway:
        busy = asyncio.create_task(gateway.client.post("/predict", content=b"[hang]"))
        await until(lambda: gateway.journal("start"))
        worker_pid = int(gateway.journal("born")[0])
        gateway.process.kill()
        await until(lambda: not is_alive(worker_pid), "the end of the worker")
        await asyncio.gather(busy, return_exceptions=True)


async def test_every_accepted_request_is_answered_before_a_stop(tmp_path: Path) -> None:
    async with gateway_process(tmp_path, max_concurrent_requests=8) as gateway:
        (tmp_path / "busy").touch()
        bodies = [b"%d [busy]" % i for i in range(8)]
        tasks = [
            asyncio.create_task(gateway.client.post("/predict", content=body)) for body in bodies
        ]
        await until(lambda: len(gateway.journal("start")) == 8)
        gateway.process.send_signal(signal.SIGTERM)
        (tmp_path / "busy").unlink()
        answers = [await task for task in tasks]
        assert await gateway.process.wait() == 0
        assert not is_alive(int(gateway.journal("born")[0]))
    assert [answer.json() for answer in answers] == [right_answer(body) for body in bodies]
    assert {answer.headers["connection"] for answer in answers} == {"close"}


async def test_what_cannot_be_answered_within_the_drain_limit_is_told_so(tmp_path: Path) -> None:
    async with gateway_process(tmp_path, drain_limit_s=0.4) as gateway:
        task = asyncio.create_task(gateway.client.post("/predict", content=b"[hang]"))
        await until(lambda: gateway.journal("start"))
        gateway.process.send_signal(signal.SIGINT)
        answer = await task
        assert await gateway.process.wait() == 0
    assert (answer.status_code, answer.json()["detail"]) == (503, "the service is stopping")


async def test_what_is_put_off_when_the_drain_ends_gets_its_answer_too(tmp_path: Path) -> None:
    (tmp_path / "offline").touch()
    async with gateway_process(tmp_path, drain_limit_s=2) as gateway:
        held = asyncio.create_task(gateway.client.post("/predict", content=b"[later]"))
        await until(lambda: len(gateway.journal("start")) >= 2, "a second try")
        gateway.process.terminate()
        assert (await held).status_code == 503
        assert await gateway.process.wait() == 0


async def test_a_second_signal_ends_the_gateway_at_once(tmp_path: Path) -> None:
    async with gateway_process(tmp_path, drain_limit_s=3600) as gateway:
        task = asyncio.create_task(gateway.client.post("/predict", content=b"[hang]"))
        await until(lambda: gateway.journal("start"))
        gateway.process.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.3)  # two signals at once would be one
        gateway.process.send_signal(signal.SIGTERM)
        await gateway.process.wait()
        await until(lambda: not is_alive(int(gateway.journal("born")[0])), "the worker's end")
        await asyncio.gather(task, return_exceptions=True)


async def test_an_worker_that_refuses_its_settings_ends_the_gateway(tmp_path: Path) -> None:
    (tmp_path / "bad-settings").touch()
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(MAIN), str(tmp_path), settings(port=free_port()).model_dump_json(),
        stderr=subprocess.PIPE,
    )  # fmt: skip
    _, stderr = await process.communicate()
    assert process.returncode == 1
    assert b"ConfigError: the worker refuses its settings" in stderr


async def test_the_gateway_is_small(tmp_path: Path) -> None:
    async with gateway_process(tmp_path) as gateway:
        await asyncio.gather(
            *(gateway.client.post("/predict", content=bytes(500_000)) for _ in range(16))
        )
        assert (memory_bytes(gateway.process.pid) or 0) < 80 * 2**20


async def test_more_requests_wait_than_launchd_allows_open_files(tmp_path: Path) -> None:
    (tmp_path / "held").touch()
    async with gateway_process(tmp_path, open_files=64) as gateway:
        answers = asyncio.gather(
            *(gateway.client.post("/predict", content=b"%d" % i) for i in range(100))
        )
        queue = {"waiting": 0, "running": 0}
        while queue["waiting"] + queue["running"] < 100:
            queue = (await gateway.client.get("/health")).json()["queue"]
        (tmp_path / "held").unlink()
        assert {answer.status_code for answer in await answers} == {200}


def test_the_gateway_imports_no_model_library_and_no_web_framework() -> None:
    code = "import sys, immich_ml_metal.gateway.serving; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    heavy = {"starlette", "numpy", "onnx", "onnxruntime", "PIL", "cv2", "mlx", "httpx"}
    assert not heavy & set(found.stdout.split())


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
@pytest.mark.parametrize(
    ("set_here", "expected"),
    [(None, "glibc.malloc.hugetlb=1"), ("glibc.malloc.arena_max=1", "glibc.malloc.arena_max=1")],
)
async def test_a_worker_asks_for_huge_pages_unless_the_operator_says_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, set_here: str | None, expected: str
) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    if set_here:
        monkeypatch.setenv("GLIBC_TUNABLES", set_here)
    async with running_gateway(tmp_path) as service:
        await service.ready()
        environment = Path(f"/proc/{service.worker_pid}/environ").read_bytes().split(b"\0")
        assert f"GLIBC_TUNABLES={expected}".encode() in environment
