"""What goes along with the requests: the wake assertion, and the missing runs after an outage."""

import asyncio
import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from doubles.gateway import Service, gateway_process, is_alive, running_gateway
from doubles.immich import KEY, ImmichDouble
from doubles.timing import until
from pydantic import SecretStr

from immich_ml_metal.errors import ConfigError
from immich_ml_metal.gateway.companions import Companions, make_companions
from immich_ml_metal.immich.api import ImmichApi
from immich_ml_metal.immich.requeue import RequeuePolicy
from immich_ml_metal.immich.requeuer import Requeuer
from immich_ml_metal.metrics import Metrics
from immich_ml_metal.settings import Settings
from immich_ml_metal.system.power import KeepAwake

TICK_S = 0.02
SETTLED_S = 0.3
HEAD_BYTES = 4096

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


class Notes:
    """Writes down what a requeuer is told."""

    def __init__(self, fault: Exception | None = None) -> None:
        self.answers: list[tuple[bytes, int]] = []
        self.ticks = 0
        self._fault = fault

    def answered(self, body: bytes, status: int) -> None:
        self.answers.append((body, status))

    async def tick(self) -> None:
        self.ticks += 1
        if self._fault is not None:
            raise self._fault


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
    companions.end(CLIP, 200)
    awake.tick()
    assert len(machine.held) == 1
    companions.end(CLIP, None)
    awake.tick()
    assert (machine.held, machine.taken) == ([], 1)


def test_a_request_goes_on_when_the_machine_cannot_be_kept_awake(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse() -> FakeAssertion:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    companions = Companions(KeepAwake(refuse), None)
    companions.begin()
    companions.end(CLIP, 200)
    assert "cannot keep the machine awake reason=Resource temporarily" in caplog.text


def test_a_caller_that_hung_up_is_not_told_of() -> None:
    notes = Notes()
    companions = Companions(None, notes)
    companions.end(CLIP, None)
    companions.end(OCR, 503)
    assert notes.answers == [(OCR, 503)]


async def test_at_the_end_the_machine_may_sleep_at_once() -> None:
    machine = Machine()
    companions = Companions(keep_awake(machine), Notes(), tick_s=TICK_S)
    companions.begin()
    running = asyncio.create_task(companions.run())
    await asyncio.sleep(0)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert machine.held == []


async def test_an_address_that_is_none_costs_a_line_and_not_the_service(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING)
    clock = [0.0]
    requeuer = Requeuer(
        lambda: ImmichApi("http://nas:port", SecretStr(KEY)),
        lambda: None,
        policy=RequeuePolicy(settled_s=60),
        clock=lambda: clock[0],
    )
    requeuer.answered(CLIP, 503)
    requeuer.answered(CLIP, 200)
    clock[0] = 61
    for _ in range(3):
        await requeuer.tick()
    assert len(caplog.records) == 1
    assert "cannot reach Immich at http://nas:port" in caplog.text


async def test_an_unforeseen_fault_is_told_once_and_tried_again_later(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def connect() -> ImmichApi:
        raise RuntimeError("a surprise")

    clock = [0.0]
    requeuer = Requeuer(connect, lambda: None, clock=lambda: clock[0])
    requeuer.answered(CLIP, 503)
    requeuer.answered(CLIP, 200)
    clock[0] = 61
    for _ in range(3):
        await requeuer.tick()
    assert [str(record.exc_info[1]) for record in caplog.records if record.exc_info] == [
        "a surprise"
    ]


def test_asking_for_lost_jobs_without_a_key_stops_the_start() -> None:
    with pytest.raises(ConfigError, match="immich_api_key"):
        make_companions(Settings(immich_requeue=True, immich_url="http://nas:2283"), Metrics())


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


async def test_only_the_beginning_of_an_upload_is_remembered(tmp_path: Path) -> None:
    notes, body = Notes(), CLIP + bytes(2**20)
    async with running_gateway(tmp_path, companions=Companions(None, notes)) as service:
        assert (await service.predict(body)).is_success
    assert notes.answers == [(body[:HEAD_BYTES], 200)]


async def hang_up(service: Service, body: bytes) -> None:
    with pytest.raises(httpx.ReadTimeout):
        await service.predict(body + b"[hang]", timeout=0.3)
    await until(lambda: service.gateway.dispatcher.counts.cancelled, "a caller that is gone")


async def lose(service: Service, folder: Path, *bodies: bytes) -> None:
    """An outage that is longer than the hold."""
    (folder / "refuse").touch()
    service.kill_worker()
    answers = await asyncio.gather(*(service.predict(body) for body in bodies))
    assert {answer.status_code for answer in answers} == {503}
    (folder / "refuse").unlink()


async def test_after_an_outage_each_lost_task_gets_one_missing_run(
    loopback: Loopback, tmp_path: Path
) -> None:
    immich, asked = ImmichDouble(), list[int]()
    url = loopback(immich.app)
    requeuer = Requeuer(
        lambda: ImmichApi(url, SecretStr(KEY)),
        lambda: asked.append(1),
        policy=RequeuePolicy(settled_s=SETTLED_S),
    )
    companions = Companions(None, requeuer, tick_s=TICK_S)
    async with running_gateway(tmp_path, companions=companions, hold_limit_s=2) as service:
        await service.ready()
        await hang_up(service, FACES)
        await lose(service, tmp_path, CLIP, CLIP + b" ", OCR, CLIP + b"  ")
        await service.ready()
        assert immich.started == []
        assert (await service.predict(FACES)).is_success
        await until(lambda: len(immich.started) == 2, "two missing runs")
        assert (await service.predict(CLIP)).is_success
        await asyncio.sleep(SETTLED_S + 5 * TICK_S)
    assert sorted(name for name, _ in immich.started) == ["ocr", "smartSearch"]
    assert [body for _, body in immich.started] == [{"command": "start", "force": False}] * 2
    assert len(asked) == 2


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
