"""Runs a gateway with the fake worker: real sockets, a real child process, this event loop."""

import asyncio
import contextlib
import hashlib
import json
import os
import random
import resource
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from doubles.timing import until

from immich_ml_metal.gateway.admission import Reception
from immich_ml_metal.gateway.app import Gateway
from immich_ml_metal.gateway.companions import Companions
from immich_ml_metal.gateway.crashes import CrashRecord
from immich_ml_metal.gateway.process import WorkerProcess
from immich_ml_metal.gateway.serving import GatewayServer
from immich_ml_metal.gateway.supervisor import Order
from immich_ml_metal.settings import Settings
from immich_ml_metal.system.listen import listen

PATIENCE_S = 30.0
MAIN = Path(__file__).with_name("gateway_main.py")


def fake_worker(folder: Path) -> list[str]:
    return [sys.executable, str(Path(__file__).with_name("worker.py")), str(folder)]


def settings(**changes: Any) -> Settings:
    return Settings(**{"host": "127.0.0.1", "port": 0, **changes})


def dump(chosen: Settings) -> str:
    """As JSON, with the key that `model_dump_json` hides."""
    known = json.loads(chosen.model_dump_json())
    if chosen.immich_api_key is not None:
        known["immich_api_key"] = chosen.immich_api_key.get_secret_value()
    return json.dumps(known)


def right_answer(body: bytes) -> dict[str, str]:
    return {"digest": hashlib.sha256(body).hexdigest()}


def read_journal(folder: Path, word: str) -> list[str]:
    """What workers wrote down: the arguments of every line that begins with `word`."""
    path = folder / "journal"
    lines = path.read_text().splitlines() if path.exists() else []
    return [line.removeprefix(word + " ") for line in lines if line.startswith(word + " ")]


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@dataclass
class Service:
    gateway: Gateway
    server: GatewayServer
    port: int
    folder: Path
    client: httpx.AsyncClient

    @property
    def state(self) -> str:
        return self.gateway.dispatcher.supervisor.state

    @property
    def worker(self) -> WorkerProcess:
        worker = self.gateway.dispatcher.supervisor.worker
        assert worker is not None
        return worker

    @property
    def worker_pid(self) -> int:
        return self.worker.pid

    def journal(self, word: str) -> list[str]:
        return read_journal(self.folder, word)

    async def predict(self, body: bytes, **options: Any) -> httpx.Response:
        return await self.client.post("/predict", content=body, **options)

    async def started(self, count: int) -> None:
        await until(lambda: len(self.journal("start")) >= count, f"{count} requests at the worker")

    async def ready(self) -> None:
        await until(lambda: self.state == "ready", "a ready worker")

    @contextlib.asynccontextmanager
    async def watched_closely(self) -> AsyncIterator[None]:
        """Look at the worker all the time instead of once a second."""

        async def look() -> None:
            while True:
                await self.gateway.watch.look()
                await asyncio.sleep(0.02)

        looking = asyncio.create_task(look())
        try:
            yield
        finally:
            looking.cancel()

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """No request with `[busy]` is answered before the block ends."""
        busy = self.folder / "busy"
        busy.touch()
        yield
        busy.unlink()

    def stop_when_idle(self) -> bool:
        return self.gateway.dispatcher.stop_if_idle(Order("idle", again=False))

    def kill_worker(self, number: signal.Signals = signal.SIGKILL) -> None:
        os.kill(self.worker_pid, number)


@contextlib.asynccontextmanager
async def running_gateway(
    folder: Path,
    *,
    companions: Companions | None = None,
    crashes: CrashRecord | None = None,
    reception: Reception | None = None,
    **changes: Any,
) -> AsyncIterator[Service]:
    chosen = settings(**changes)
    gateway = Gateway(
        chosen,
        command=fake_worker(folder),
        companions=companions,
        crashes=crashes,
        reception=reception,
    )
    server = GatewayServer(gateway)
    sockets = listen(chosen.host, chosen.port)
    port = sockets[0].getsockname()[1]
    serving = asyncio.create_task(server.serve(sockets))
    await until(lambda: server.started or serving.done(), "a started server")
    limits = httpx.Limits(max_connections=None)
    url = f"http://127.0.0.1:{port}"
    try:
        async with httpx.AsyncClient(base_url=url, timeout=PATIENCE_S, limits=limits) as client:
            yield Service(gateway, server, port, folder, client)
    finally:
        server.should_exit = True
        await serving


@dataclass
class GatewayProcess:
    process: asyncio.subprocess.Process
    client: httpx.AsyncClient
    folder: Path

    def journal(self, word: str) -> list[str]:
        return read_journal(self.folder, word)

    async def answers_ping(self) -> None:
        for _ in range(int(PATIENCE_S / 0.01)):
            try:
                response = await self.client.get("/ping")
            except httpx.ConnectError:
                await asyncio.sleep(0.01)
            else:
                assert response.text == "pong"
                return
        raise AssertionError("no answer to /ping")


def free_port() -> int:
    """A port that stays free until it is used: the system never gives one of these away itself."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


@contextlib.asynccontextmanager
async def gateway_process(
    folder: Path,
    *,
    open_files: int | None = None,
    hard_files: int | None = None,
    programs: Path | None = None,
    port: int = 0,
    times: dict[str, float] | None = None,
    **changes: Any,
) -> AsyncIterator[GatewayProcess]:
    """A process that finds `open_files` as its soft limit and `programs` first on its path.

    `hard_files` is its hard limit, this process's own if None; `times` are those of the guard of
    Immich's queues.
    """

    def limit_files() -> None:
        if open_files is not None:
            _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (open_files, hard_files or hard))

    port = port or free_port()
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(MAIN),
        str(folder),
        dump(settings(port=port, **changes)),
        *([json.dumps(times)] if times else []),
        stdin=asyncio.subprocess.DEVNULL,
        preexec_fn=limit_files,
        env={**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"} if programs else None,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:
            gateway = GatewayProcess(process, client, folder)
            await gateway.answers_ping()
            yield gateway
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
