"""The gateway as a process of its own: its start, its size, its signals, its death."""

import asyncio
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from gateway_harness import PATIENCE_S, is_alive, right_answer, settings, until
from immich_ml_metal.footprint import memory_bytes

MAIN = Path(__file__).with_name("gateway_main.py")


@dataclass
class GatewayProcess:
    process: asyncio.subprocess.Process
    client: httpx.AsyncClient
    folder: Path

    def journal(self, word: str) -> list[str]:
        path = self.folder / "journal"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line.removeprefix(word + " ") for line in lines if line.startswith(word + " ")]

    async def answers_ping(self) -> None:
        for _ in range(int(PATIENCE_S / 0.02)):
            try:
                response = await self.client.get("/ping")
            except httpx.ConnectError:
                await asyncio.sleep(0.02)
            else:
                assert response.text == "pong"
                return
        raise AssertionError("no answer to /ping")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


@asynccontextmanager
async def gateway_process(folder: Path, **changes: Any) -> AsyncIterator[GatewayProcess]:
    port = free_port()
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(MAIN), str(folder), settings(port=port, **changes).model_dump_json()
    )
    url = f"http://127.0.0.1:{port}"
    try:
        async with httpx.AsyncClient(base_url=url, timeout=PATIENCE_S) as client:
            gateway = GatewayProcess(process, client, folder)
            await gateway.answers_ping()
            yield gateway
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def test_the_engine_ends_when_the_gateway_is_killed(tmp_path: Path) -> None:
    async with gateway_process(tmp_path) as gateway:
        busy = asyncio.create_task(gateway.client.post("/predict", content=b"[hang]"))
        await until(lambda: gateway.journal("start"))
        engine_pid = int(gateway.journal("born")[0])
        gateway.process.kill()
        await until(lambda: not is_alive(engine_pid), "the end of the engine")
        await asyncio.gather(busy, return_exceptions=True)


async def test_every_accepted_request_is_answered_before_a_stop(tmp_path: Path) -> None:
    async with gateway_process(tmp_path) as gateway:
        bodies = [b"%d [sleep 0.5]" % i for i in range(8)]
        tasks = [
            asyncio.create_task(gateway.client.post("/predict", content=body)) for body in bodies
        ]
        await until(lambda: len(gateway.journal("start")) == 8)
        gateway.process.send_signal(signal.SIGTERM)
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


async def test_a_second_signal_ends_the_gateway_at_once(tmp_path: Path) -> None:
    async with gateway_process(tmp_path, drain_limit_s=3600) as gateway:
        task = asyncio.create_task(gateway.client.post("/predict", content=b"[hang]"))
        await until(lambda: gateway.journal("start"))
        gateway.process.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.3)  # two signals at once would be one
        gateway.process.send_signal(signal.SIGTERM)
        await gateway.process.wait()
        await until(lambda: not is_alive(int(gateway.journal("born")[0])), "the engine's end")
        await asyncio.gather(task, return_exceptions=True)


async def test_an_engine_that_refuses_its_settings_ends_the_gateway(tmp_path: Path) -> None:
    (tmp_path / "bad-settings").touch()
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(MAIN), str(tmp_path), settings(port=free_port()).model_dump_json(),
        stderr=subprocess.PIPE,
    )  # fmt: skip
    _, stderr = await process.communicate()
    assert process.returncode == 1
    assert b"ConfigError: the engine refuses its settings" in stderr


async def test_the_gateway_is_small(tmp_path: Path) -> None:
    async with gateway_process(tmp_path) as gateway:
        await asyncio.gather(
            *(gateway.client.post("/predict", content=bytes(500_000)) for _ in range(16))
        )
        assert (memory_bytes(gateway.process.pid) or 0) < 80 * 2**20


def test_the_gateway_imports_no_model_library_and_no_web_framework() -> None:
    code = "import sys, immich_ml_metal.serving; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    heavy = {"fastapi", "starlette", "numpy", "onnx", "onnxruntime", "PIL", "cv2", "mlx", "httpx"}
    assert not heavy & set(found.stdout.split())
