"""An Immich that burns jobs, the port it asks, and our service as real processes on that port."""

import asyncio
import json
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from doubles.gateway import GatewayProcess, free_port, gateway_process
from doubles.immich import KEY, ImmichDouble
from doubles.live import serve
from doubles.timing import PATIENCE_S, until

QUEUES = {"smartSearch", "faceDetection", "ocr"}
TIMES = {
    "tick_s": 0.1,
    "look_s": 0.3,
    "settings_s": 0.3,
    "call_s": 2.0,
    "settled_s": 0.5,
    "drained_s": 0.5,
    "first_rest_s": 0.5,
    "probe_s": 0.2,
    "longest_probe_s": 0.5,
}


@dataclass
class House:
    """An Immich, the port it asks, and what remains between two runs of our service."""

    immich: ImmichDouble
    url: str
    port: int
    folder: Path
    times: dict[str, float] = field(default_factory=dict)

    @asynccontextmanager
    async def service(self, **changes: Any) -> AsyncIterator[GatewayProcess]:
        chosen = {
            "immich_url": self.url,
            "immich_api_key": KEY,
            "state_dir": self.folder / "state",
            "drain_limit_s": 1000,  # a stop that waits for its limit fails a test
            **changes,
        }
        async with gateway_process(
            self.folder, port=self.port, times=self.times, **chosen
        ) as gateway:
            yield gateway

    def records(self) -> dict[str, Any]:
        known: dict[str, Any] = json.loads((self.folder / "state" / "guard.json").read_text())
        return known

    async def repaired(self, patience_s: float = 60.0) -> None:
        """Every asset has its rows, and nothing is left to do."""
        await until(
            lambda: not any(self.immich.missing().values()) and self.immich.is_idle,
            "a row for every asset",
            patience_s,
        )


@contextmanager
def running_house(folder: Path, times: dict[str, float] | None = None) -> Iterator[House]:
    """An Immich at work, with our service yet to be started."""
    port = free_port()
    immich = ImmichDouble(f"http://127.0.0.1:{port}")
    with serve(immich.app) as url:
        yield House(immich, url, port, folder, times or {})


async def health(gateway: GatewayProcess) -> dict[str, Any]:
    found: dict[str, Any] = (await gateway.client.get("/health")).json()
    return found


async def guard_is(gateway: GatewayProcess, state: str) -> dict[str, Any]:
    end_s = time.monotonic() + PATIENCE_S
    while (guard := (await health(gateway))["guard"])["state"] != state or "asked yet" in guard.get(
        "why_off", ""
    ):
        assert time.monotonic() < end_s, guard
        await asyncio.sleep(0.05)
    return guard  # type: ignore[no-any-return]


async def stop(gateway: GatewayProcess, number: signal.Signals = signal.SIGTERM) -> float:
    started_s = time.monotonic()
    gateway.process.send_signal(number)
    await gateway.process.wait()
    return time.monotonic() - started_s
