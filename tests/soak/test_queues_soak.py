"""Immich's queues in full length: 240 jobs, the service away for 20 s, our own times."""

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from doubles.house import QUEUES, House, guard_is, running_house, stop
from doubles.timing import until

pytestmark = [pytest.mark.soak, pytest.mark.timeout(600)]
JOBS = 240
AWAY_S = 20.0


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    with running_house(tmp_path) as house:
        yield house


async def test_twenty_seconds_away_lose_no_job(house: House) -> None:
    async with house.service() as gateway:
        await guard_is(gateway, "on")
        house.immich.upload(JOBS)
        await until(lambda: house.immich.waiting < 2.5 * JOBS, "an import in full swing")
        took_s = await stop(gateway)
        kept = house.immich.waiting
        assert house.immich.paused == QUEUES
    await asyncio.sleep(AWAY_S)
    assert house.immich.waiting == kept
    async with house.service():
        started_s = time.monotonic()
        await until(lambda: not house.immich.paused, "resumed queues")
        resumed_s = time.monotonic() - started_s
        await house.repaired(300)
    print(f"stopped in {took_s:.1f} s, {kept} kept, resumed after {resumed_s:.1f} s")  # noqa: T201
    assert (house.immich.lost, house.immich.started) == (0, [])


async def test_a_kill_and_twenty_seconds_away_are_repaired(house: House) -> None:
    async with house.service() as gateway:
        await guard_is(gateway, "on")
        house.immich.upload(JOBS)
        await until(lambda: house.immich.waiting < 2.5 * JOBS, "an import in full swing")
        gateway.process.kill()
        await gateway.process.wait()
        await asyncio.sleep(AWAY_S)
    lost = house.immich.lost
    assert lost > JOBS
    async with house.service():
        started_s = time.monotonic()
        await house.repaired(400)
        took_s = time.monotonic() - started_s
    print(f"{lost} jobs burnt, all repaired {took_s:.0f} s after the start")  # noqa: T201
    assert house.immich.paused == set()


async def test_a_model_that_is_missing_offline_loses_no_job(house: House) -> None:
    (house.folder / "broken-clip").write_text("ModelUnavailable")
    async with house.service() as gateway:
        await guard_is(gateway, "on")
        house.immich.upload(200)
        await until(lambda: house.immich.paused == {"smartSearch"}, "one paused queue")
        await asyncio.sleep(AWAY_S)
        assert house.immich.missing()["smartSearch"] == 200
        (house.folder / "broken-clip").unlink()
        await house.repaired(300)
    assert (house.immich.lost, house.immich.paused) == (0, set())
