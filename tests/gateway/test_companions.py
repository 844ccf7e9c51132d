"""What goes along with the requests: the wake assertion, and whom the guard is told of."""

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from doubles.gateway import gateway_process, is_alive, running_gateway
from doubles.timing import until

from immich_ml_metal.gateway.asked import Asked
from immich_ml_metal.gateway.companions import (
    NO_KEY,
    SWITCHED_OFF,
    Companions,
    make_companions,
)
from immich_ml_metal.immich.own import OwnSide
from immich_ml_metal.metrics import Metrics
from immich_ml_metal.settings import Settings
from immich_ml_metal.system.power import KeepAwake

TICK_S = 0.02

ASKED = Asked(("clip",), "m")
WITH_KEY = {"immich_url": "http://nas:2283", "immich_api_key": "k"}
CLIP = b'{"clip":{"visual":{"modelName":"m"}}}'
FACES = b'{"facial-recognition":{"detection":{"modelName":"m"}}}'
OCR = b'{"ocr":{"detection":{"modelName":"m"}}}'

Loopback = Callable[[Any], str]


class FakeAssertion:
    def __init__(self, held: list["FakeAssertion"]) -> None:
        self._held = held
        held.append(self)

    def terminate(self) -> None:
        self._held.remove(self)

    def wait(self) -> None: ...


class Machine:
    """Counts the assertions that are held, and all there ever were."""

    def __init__(self) -> None:
        self.held: list[FakeAssertion] = []
        self.taken = 0

    def assert_awake(self) -> FakeAssertion:
        self.taken += 1
        return FakeAssertion(self.held)


def keep_awake(machine: Machine) -> KeepAwake:
    return KeepAwake(machine.assert_awake, linger_s=0)


# -- by themselves ---------------------------------------------------------------------------------


def test_the_machine_is_kept_awake_from_the_first_request_to_the_last() -> None:
    machine = Machine()
    awake = keep_awake(machine)
    companions = Companions(awake, None)
    assert machine.held == []
    companions.begin()
    companions.begin()
    companions.end(ASKED, is_lost=False)
    awake.tick()
    assert len(machine.held) == 1
    companions.end(ASKED, is_lost=False)
    awake.tick()
    assert (machine.held, machine.taken) == ([], 1)


def test_a_request_goes_on_when_the_machine_cannot_be_kept_awake(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse() -> FakeAssertion:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    companions = Companions(KeepAwake(refuse), None)
    companions.begin()
    companions.end(ASKED, is_lost=False)
    assert "cannot keep the machine awake reason=Resource temporarily" in caplog.text


async def test_at_the_end_the_machine_may_sleep_at_once() -> None:
    machine = Machine()
    companions = Companions(keep_awake(machine), None, tick_s=TICK_S)
    companions.begin()
    running = asyncio.create_task(companions.run())
    await asyncio.sleep(0)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert machine.held == []


class FakeGuard:
    """Guards until it is told otherwise."""

    def __init__(self) -> None:
        self.said: list[str] = []

    async def run(self) -> None:
        self.said.append("run")
        try:
            await asyncio.sleep(3600)
        finally:
            self.said.append("run ended")

    async def stop(self, *, is_planned: bool) -> bool:
        self.said.append(f"stop {is_planned}")
        return is_planned

    async def close(self) -> None:
        self.said.append("close")


@pytest.mark.parametrize("is_planned", [True, False])
async def test_at_the_end_the_guard_rests_then_pauses_then_is_closed(is_planned: bool) -> None:
    guard: Any = FakeGuard()
    companions = Companions(None, guard, tick_s=TICK_S)
    running = asyncio.create_task(companions.run())
    await until(lambda: guard.said == ["run"])
    stopping = asyncio.create_task(companions.before_end(is_planned=is_planned))
    await until(stopping.done, patience_s=5)
    assert stopping.result() is is_planned
    await companions.close()
    assert guard.said == ["run", "run ended", f"stop {is_planned}", "close"]
    running.cancel()
    await asyncio.wait({running})


async def test_a_guard_that_nobody_stopped_rests_before_it_is_closed() -> None:
    guard: Any = FakeGuard()
    companions = Companions(None, guard, tick_s=TICK_S)
    running = asyncio.create_task(companions.run())
    await until(lambda: guard.said == ["run"])
    closing = asyncio.create_task(companions.close())
    await until(closing.done, patience_s=5)
    assert guard.said == ["run", "run ended", "close"]
    running.cancel()
    await asyncio.wait({running})


def make(**settings: Any) -> Companions:
    own = OwnSide(
        port=lambda: 3003,
        is_ready=lambda: True,
        troubles=dict,
        probe=lambda *_: asyncio.sleep(0, ""),
        expect=lambda _: None,
    )
    return make_companions(Settings(**settings), Metrics(), own)


def test_without_a_key_it_is_said_what_a_key_would_add() -> None:
    assert make(immich_url="http://nas:2283").describe() == {"state": "off", "why_off": NO_KEY}
    assert "their jobs are lost" in NO_KEY


def test_with_a_key_the_queues_are_guarded_unless_that_is_switched_off(tmp_path: Path) -> None:
    whole: dict[str, Any] = {
        "immich_url": "http://nas:2283",
        "immich_api_key": "k",
        "state_dir": tmp_path,
    }
    assert make(**whole).describe()["why_off"] == "Immich has not been asked yet"
    assert make(**whole, immich_guard=False).describe()["why_off"] == SWITCHED_OFF


async def test_a_gateway_without_a_key_does_without_httpx_and_numpy(tmp_path: Path) -> None:
    code = (
        "import sys; from immich_ml_metal.gateway.app import Gateway; "
        "from immich_ml_metal.settings import Settings; "
        "Gateway(Settings(**eval(sys.argv[1]))); print('httpx' in sys.modules, end='')"
    )
    for changes, loaded in (({}, "False"), (WITH_KEY, "True")):
        chosen = repr(changes | {"state_dir": str(tmp_path)})
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", code, chosen, stdout=asyncio.subprocess.PIPE
        )
        out, _ = await process.communicate()
        assert out.decode() == loaded


# -- in a running gateway --------------------------------------------------------------------------


async def test_the_assertion_follows_the_requests(tmp_path: Path) -> None:
    machine = Machine()
    companions = Companions(keep_awake(machine), None, tick_s=TICK_S)
    async with running_gateway(tmp_path, companions=companions) as service:
        await service.client.get("/ping")
        await service.client.get("/health")
        assert machine.taken == 0
        long = asyncio.create_task(service.predict(b"[hang]"))
        await service.started(1)
        assert (await service.predict(CLIP)).is_success
        await asyncio.sleep(5 * TICK_S)
        assert (len(machine.held), machine.taken) == (1, 1)
        long.cancel()
        await until(lambda: not machine.held, "the end of the assertion")
        assert machine.taken == 1


async def test_a_real_gateway_holds_a_caffeinate_while_it_works(tmp_path: Path) -> None:
    program = tmp_path / "bin" / "caffeinate"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "awake $$ $*" >> {tmp_path}/journal\nexec sleep 60\n')
    program.chmod(0o755)
    async with gateway_process(tmp_path, programs=program.parent) as gateway:
        assert gateway.journal("awake") == []
        assert (await gateway.client.post("/predict", content=CLIP)).is_success
        await until(lambda: gateway.journal("awake"), "a held assertion")
        assert (await gateway.client.post("/predict", content=OCR)).is_success
        (line,) = gateway.journal("awake")
        pid, *arguments = line.split()
        assert arguments == ["-i", "-w", str(gateway.process.pid)]
        os.kill(gateway.process.pid, signal.SIGTERM)
        await gateway.process.wait()
        assert not is_alive(int(pid))
