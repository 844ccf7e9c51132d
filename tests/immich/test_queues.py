"""Immich's queues through stops, crashes and broken models: real HTTP, real gateway processes.

The double burns jobs as Immich 3.1.0 does. Seconds are scaled down; `make soak` runs them in full.
"""

import asyncio
import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from doubles.gateway import GatewayProcess
from doubles.house import QUEUES, TIMES, House, guard_is, health, running_house, stop
from doubles.timing import until


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    with running_house(tmp_path, TIMES) as house:
        yield house


# -- planned stops ---------------------------------------------------------------------------------


async def test_a_stop_in_the_middle_of_an_import_loses_no_job(house: House) -> None:
    async with house.service() as gateway:
        await guard_is(gateway, "on")
        house.immich.upload(80)
        await until(lambda: house.immich.waiting < 200, "an import in full swing")
        await stop(gateway)
        assert house.immich.paused == QUEUES
        assert house.immich.waiting > 50
        assert set(house.records()["paused"]) == {"clip", "facial-recognition", "ocr"}
    await asyncio.sleep(1)
    async with house.service():
        await house.repaired()
        await until(lambda: not house.immich.paused, "resumed queues")
    assert house.immich.lost == 0
    assert house.immich.started == []


async def test_queues_are_paused_side_by_side(house: House) -> None:
    async with house.service() as gateway:
        await guard_is(gateway, "on")
        house.immich.hangs_s = 0.8
        gateway.process.send_signal(signal.SIGTERM)
        await until(lambda: house.immich.paused == QUEUES, "three paused queues")
        assert house.immich.most_commanded == 3
        house.immich.hangs_s = 0
        await gateway.process.wait()


async def test_an_immich_that_hangs_does_not_hold_up_the_stop(house: House) -> None:
    async with house.service() as gateway:
        await guard_is(gateway, "on")
        house.immich.hangs_s = 1000
        await stop(gateway)
        assert house.records()["running_since"] is None
        wanted = {task: one["reason"] for task, one in house.records()["repairs"].items()}
        assert set(wanted) == {"clip", "facial-recognition", "ocr"}
        assert all("could not be paused" in reason for reason in wanted.values())
        house.immich.hangs_s = 0


async def test_a_queue_that_somebody_paused_is_left_alone(house: House) -> None:
    house.immich.queues["ocr"].is_paused = True
    async with house.service() as gateway:
        await guard_is(gateway, "on")
        house.immich.upload(10)
        await stop(gateway)
        assert house.immich.paused == QUEUES
        assert "ocr" not in house.records()["paused"]
    async with house.service():
        await until(lambda: house.immich.paused == {"ocr"}, "only the user's own pause")
        await until(lambda: house.immich.missing()["faceDetection"] == 0, "faces of all")
        await asyncio.sleep(1)
    assert house.immich.paused == QUEUES or house.immich.paused == {"ocr"}
    assert len(house.immich.queues["ocr"].waiting) == 10


async def test_ctrl_c_leaves_no_queue_paused(house: House) -> None:
    async with house.service() as gateway:
        await guard_is(gateway, "on")
        await stop(gateway)
    assert house.immich.paused == QUEUES
    async with house.service() as gateway:
        await guard_is(gateway, "on")
        await until(lambda: not house.immich.paused, "resumed queues")
        (house.folder / "broken-ocr").write_text("ModelUnavailable")
        house.immich.upload(3)
        await until(lambda: house.immich.paused == {"ocr"}, "the pause of a broken task")
        await stop(gateway, signal.SIGINT)
    assert house.immich.paused == set()


async def test_jobs_that_a_stop_finds_held_are_asked_for_once_they_can_be_answered(
    house: House,
) -> None:
    (house.folder / "broken-ocr").write_text("ModelUnavailable")
    async with house.service() as gateway:
        await guard_is(gateway, "on")
        house.immich.upload(5)
        await until(lambda: house.immich.paused == {"ocr"}, "the pause of a broken task")
        await stop(gateway)
    assert house.immich.queues["ocr"].lost == 1  # the one that was held
    (house.folder / "broken-ocr").unlink()
    async with house.service():
        await house.repaired()


# -- ends that nobody planned ----------------------------------------------------------------------


async def test_after_a_kill_in_an_import_everything_missing_is_asked_for_once(house: House) -> None:
    async with house.service() as gateway:
        await guard_is(gateway, "on")
        house.immich.upload(80)
        await until(lambda: house.immich.waiting < 200, "an import in full swing")
        gateway.process.kill()
        await gateway.process.wait()
        await until(lambda: house.immich.is_idle, "a burnt queue")
    assert house.immich.lost > 50
    async with house.service() as gateway:
        await house.repaired()
        await until(lambda: len(house.immich.started) == 4, "runs of three tasks and duplicates")
        guard = (await health(gateway))["guard"]
        assert guard["unplanned_end"] is not None
        await asyncio.sleep(1.5)
    names = [name for name, _ in house.immich.started]
    assert sorted(names) == sorted([*QUEUES, "duplicateDetection"])
    assert names[-1] == "duplicateDetection" or names.index("duplicateDetection") > names.index(
        "smartSearch"
    )


async def test_a_kill_while_the_queues_are_paused_leaves_none_paused(house: House) -> None:
    (house.folder / "broken-clip").write_text("ModelUnavailable")
    async with house.service() as gateway:
        await guard_is(gateway, "on")
        house.immich.upload(30)
        await until(lambda: "smartSearch" in house.immich.paused, "the pause of a broken task")
        gateway.process.kill()
        await gateway.process.wait()
    (house.folder / "broken-clip").unlink()
    async with house.service():
        await house.repaired()
        assert house.immich.paused == set()


async def test_a_second_sigterm_is_an_end_that_nobody_planned(house: House) -> None:
    async with house.service() as gateway:
        await guard_is(gateway, "on")
        long = asyncio.create_task(gateway.client.post("/predict", content=b"[hang]"))
        await until(lambda: gateway.journal("start"), "a request at the worker")
        gateway.process.send_signal(signal.SIGTERM)
        await until(lambda: house.immich.paused == QUEUES, "three paused queues")
        await stop(gateway)
        await asyncio.gather(long, return_exceptions=True)
    assert house.records()["running_since"] is not None
    assert house.records()["paused"].keys() == {"clip", "facial-recognition", "ocr"}


@pytest.mark.timeout(300)
async def test_power_cuts_at_random_moments_leave_nothing_missing(house: House) -> None:
    chance = random.Random(12)
    for _ in range(10):
        house.immich.upload(8)
        async with house.service() as gateway:
            await asyncio.sleep(chance.uniform(0, 1.5))
            if chance.random() < 0.5:  # the cut comes in the middle of a planned stop
                gateway.process.send_signal(signal.SIGTERM)
                await asyncio.sleep(chance.uniform(0, 0.5))
            if gateway.process.returncode is None:
                gateway.process.kill()
            await gateway.process.wait()
    async with house.service():
        await house.repaired()
        await until(lambda: not house.immich.paused, "no paused queue")


async def test_a_busy_queue_does_not_keep_the_others_from_repair(house: House) -> None:
    async with house.service() as gateway:
        await guard_is(gateway, "on")
        house.immich.upload(20)
        gateway.process.kill()
        await gateway.process.wait()
        await until(lambda: house.immich.is_idle, "a burnt queue")
    house.immich.queues["smartSearch"].active += 1  # a job that never ends
    async with house.service():
        await until(
            lambda: house.immich.missing() == {"smartSearch": 20, "faceDetection": 0, "ocr": 0},
            "faces and text of all",
        )
        house.immich.queues["smartSearch"].active -= 1
        await house.repaired()


# -- what cannot be served -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("failure", "jobs"), [("ModelUnavailable", 200), ("UnknownModel", 30), ("LoadFailed", 30)]
)
async def test_with_a_key_a_broken_model_loses_no_job(
    house: House, failure: str, jobs: int
) -> None:
    (house.folder / "broken-clip").write_text(failure)
    async with house.service() as gateway:
        await guard_is(gateway, "on")
        house.immich.upload(jobs)
        await until(lambda: house.immich.paused == {"smartSearch"}, "one paused queue")
        pause = (await health(gateway))["guard"]["paused"]["smartSearch"]
        assert failure in pause["reason"]
        await until(lambda: house.immich.missing()["ocr"] < jobs - 10, "the others going on")
        assert house.immich.paused == {"smartSearch"}
        queues = (await health(gateway))["guard"]["queues"]
        assert {name: queue["is_paused"] for name, queue in queues.items()} == {
            "smartSearch": True,
            "faceDetection": False,
            "ocr": False,
        }
        (house.folder / "broken-clip").unlink()
        await house.repaired()
    assert house.immich.lost == 0


async def test_a_worker_that_only_crashes_pauses_all_and_mends_by_itself(house: House) -> None:
    async with house.service() as gateway:
        await guard_is(gateway, "on")
        (house.folder / "refuse").touch()
        house.immich.upload(10)
        await kill_worker(gateway)
        await until(lambda: house.immich.paused == QUEUES, "three paused queues")
        (house.folder / "refuse").unlink()
        await house.repaired()
        await until(lambda: not house.immich.paused, "resumed queues")
    assert house.immich.lost == 0


async def kill_worker(gateway: GatewayProcess) -> None:
    pid = (await health(gateway))["worker"]["pid"]
    os.kill(pid, signal.SIGKILL)


async def test_without_a_key_a_broken_model_loses_one_job_per_slot_and_hold_limit(
    house: House,
) -> None:
    (house.folder / "broken-clip").write_text("ModelUnavailable")
    async with house.service(immich_api_key=None, hold_limit_s=3) as gateway:
        house.immich.upload(100)
        started_s = time.monotonic()
        await until(lambda: house.immich.missing()["ocr"] == 0, "the text of all")
        assert house.immich.queues["faceDetection"].lost == 0
        assert house.immich.missing()["smartSearch"] > 80
        (house.folder / "broken-clip").unlink()
        await until(lambda: house.immich.is_idle, "the end of the import")
        assert (await health(gateway))["troubles"] == []
    slots, limits = 2, 1 + (time.monotonic() - started_s) // 3
    assert house.immich.lost <= slots * limits


# -- where nothing is paused -----------------------------------------------------------------------


def two_urls(house: House) -> dict[str, Any]:
    house.immich.config["machineLearning"]["urls"].append("http://192.0.2.1:3003")
    return {}


def another_machine(house: House) -> dict[str, Any]:
    house.immich.config["machineLearning"]["urls"] = ["http://192.0.2.1:3003"]
    return {}


def no_permission(house: House) -> dict[str, Any]:
    house.immich.permissions.discard("job.read")
    return {}


def no_command(house: House) -> dict[str, Any]:
    house.immich.permissions.discard("job.create")
    return {}


def read_only(house: House) -> dict[str, Any]:
    (house.folder / "file").touch()  # root may write into read-only folders, not below a file
    return {"state_dir": house.folder / "file" / "state"}


def damaged(house: House) -> dict[str, Any]:
    (house.folder / "state").mkdir()
    (house.folder / "state" / "guard.json").write_text("{")
    return {}


def switched_off(_: House) -> dict[str, Any]:
    return {"immich_guard": False}


@pytest.mark.parametrize(
    ("prepare", "why"),
    [
        (two_urls, "another URL beside ours (http://192.0.2.1:3003)"),
        (another_machine, "do not name this machine"),
        (no_permission, "it lacks job.read"),
        (no_command, "it lacks job.create"),
        (read_only, "cannot write"),
        (damaged, "is damaged"),
        (switched_off, "immich_guard is off"),
    ],
)
async def test_elsewhere_nothing_is_paused_and_it_is_said_why(
    house: House, prepare: Callable[[House], dict[str, Any]], why: str
) -> None:
    changes = prepare(house)
    async with house.service(**changes) as gateway:
        guard: dict[str, Any] = {}
        for _ in range(100):
            guard = (await health(gateway))["guard"]
            if why in json.dumps(guard):
                break
            await asyncio.sleep(0.05)
        assert why in json.dumps(guard)
        assert (await gateway.client.post("/predict", content=b"x")).is_success
        await stop(gateway)
    assert house.immich.commands == []
