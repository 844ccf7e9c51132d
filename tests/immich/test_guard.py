"""The guard by itself, where Immich, the disk or the moment of the end is against it."""

import asyncio
import logging
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from doubles.immich import KEY, ImmichDouble
from doubles.live import serve
from doubles.timing import until
from pydantic import SecretStr
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from immich_ml_metal.immich.api import ImmichApi, ImmichError
from immich_ml_metal.immich.guard import Guard
from immich_ml_metal.immich.keeper import Keeper
from immich_ml_metal.immich.own import OwnSide, Times
from immich_ml_metal.immich.records import DOCUMENT, STOPPED, VERSION, Pause, Records
from immich_ml_metal.metrics import Metrics
from immich_ml_metal.state import StateFolder, StateUnusable

PORT = 3003
SINCE = "2026-11-25T10:00:00+00:00"
QUEUES = {"smartSearch", "faceDetection", "ocr"}
TIMES = Times(
    tick_s=0.02, look_s=0.05, settings_s=0.05, call_s=2.0, stop_s=2.0, settled_s=0.1, probe_s=0.05
)
BROKEN = {"ocr": ("PP-OCRv5_mobile", "no such model")}


class Ours:
    """Our service, as far as the guard looks at it."""

    def __init__(self) -> None:
        self.is_ready = True
        self.troubles: dict[str, tuple[str, str]] = {}

    async def probe(self, task: str, model: str) -> str:
        return "it is not answered" if task in self.troubles else ""

    def side(self) -> OwnSide:
        return OwnSide(
            port=lambda: PORT,
            is_ready=lambda: self.is_ready,
            troubles=lambda: self.troubles,
            probe=self.probe,
            expect=lambda _: None,
        )


class Place:
    """An Immich, a state folder and our service, through several runs of the guard."""

    def __init__(self, immich: ImmichDouble, url: str, folder: StateFolder) -> None:
        self.immich, self.url, self.folder, self.ours = immich, url, folder, Ours()

    def remember(self, **records: Any) -> None:
        self.folder.write(DOCUMENT, VERSION, Records(**records).document())

    @asynccontextmanager
    async def guard(
        self, key: str = KEY, *, is_trial: bool = False
    ) -> AsyncIterator[tuple[Guard, asyncio.Task[None]]]:
        """A guard at work, which ends as by `kill -9` unless the test stops it."""
        keeper = Keeper(ImmichApi(self.url, SecretStr(key)), self.folder)
        side, metrics = self.ours.side(), Metrics("gateway")
        guard = Guard(keeper, side, metrics, is_trial=is_trial, times=TIMES)
        running = asyncio.create_task(guard.run())
        try:
            yield guard, running
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            await keeper.arrived()
            keeper.close()
            keeper.immich.close()


async def end(guard: Guard, running: asyncio.Task[None]) -> bool:
    """A planned stop, as the gateway does it; whether queues are paused."""
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    is_paused = await guard.stop(is_planned=True)
    await guard.close()
    return is_paused


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    immich = ImmichDouble(f"http://127.0.0.1:{PORT}")
    with serve(immich.app) as url:
        yield Place(immich, url, StateFolder(tmp_path / "state"))


async def is_on(guard: Guard) -> None:
    await until(lambda: guard.describe()["state"] == "on", "a guard that is on")


# -- the moment of the end -------------------------------------------------------------------------


async def test_a_resume_that_is_on_its_way_does_not_undo_the_pause_of_a_stop(place: Place) -> None:
    place.remember(paused={"clip": Pause(STOPPED, SINCE)})
    place.immich.queues["smartSearch"].is_paused = True
    place.ours.is_ready = False
    async with place.guard() as (guard, running):
        await is_on(guard)
        place.immich.hangs_s = 0.3
        place.ours.is_ready = True
        await until(lambda: guard.keeper._on_their_way, "a resume on its way")
        assert await end(guard, running)
        await asyncio.sleep(0.5)
        assert place.immich.paused == QUEUES
        assert Records.load(place.folder).paused.keys() == {"clip", "facial-recognition", "ocr"}


async def test_an_immich_that_was_never_reached_is_asked_for_missing_results_after_a_stop(
    place: Place,
) -> None:
    place.immich.fails["GET"] = 502
    async with place.guard() as (guard, running):
        await until(lambda: "502" in guard.describe()["last_trouble_with_immich"])
        assert not await end(guard, running)
    wanted = Records.load(place.folder).repairs
    assert {task for task, repair in wanted.items() if repair.is_wanted} == {
        "clip",
        "facial-recognition",
        "ocr",
    }


async def test_a_fault_in_the_stop_is_said_and_does_not_keep_the_service_from_ending(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with place.guard() as (guard, running):
        await is_on(guard)
        monkeypatch.setattr(ImmichApi, "settings", lambda *_: 1 // 0)
        assert not await end(guard, running)
    assert "ZeroDivisionError" in caplog.text
    assert Records.load(place.folder).repairs["ocr"].is_wanted


async def test_a_power_cut_between_writing_and_pausing_is_nobodys_wish_to_go_on(
    place: Place,
) -> None:
    place.remember(paused={"ocr": Pause("no such model", SINCE)}, running_since=SINCE)
    place.ours.troubles = dict(BROKEN)
    async with place.guard():
        await until(lambda: place.immich.paused == {"ocr"}, "the pause of a broken task")


async def test_a_queue_that_somebody_resumed_is_not_paused_again_for_the_same_trouble(
    place: Place,
) -> None:
    place.ours.troubles = dict(BROKEN)
    async with place.guard():
        await until(lambda: place.immich.paused == {"ocr"}, "the pause of a broken task")
        await asyncio.sleep(0.2)
        place.immich.queues["ocr"].is_paused = False
        await asyncio.sleep(0.5)
        assert place.immich.paused == set()
        assert Records.load(place.folder).paused == {}


async def test_a_trial_in_a_terminal_pauses_nothing_of_an_immich_that_names_us(
    place: Place,
) -> None:
    place.ours.troubles = dict(BROKEN)
    async with place.guard(is_trial=True) as (guard, running):
        await until(lambda: "terminal" in guard.describe()["why_off"], "a look at Immich")
        await asyncio.sleep(0.3)
        assert guard.describe()["state"] == "off"
        assert not await end(guard, running)
    assert ("ocr", "pause") not in place.immich.commands
    assert place.immich.paused == set()


# -- the name server against it --------------------------------------------------------------------


class Names:
    """A name server that knows Immich's name of us, until it fails or hangs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fails, self.hangs_s, self.asked = False, 0.0, 0
        self._ask = socket.getaddrinfo
        monkeypatch.setattr(socket, "getaddrinfo", self.look_up)

    def look_up(self, host: Any, *args: Any, **kwargs: Any) -> Any:
        if host != "ml.example":
            return self._ask(host, *args, **kwargs)
        self.asked += 1
        time.sleep(self.hangs_s)
        if self.fails:
            raise socket.gaierror(socket.EAI_AGAIN, "try again")
        return self._ask("127.0.0.1", *args, **kwargs)


@pytest.fixture
def names(place: Place, monkeypatch: pytest.MonkeyPatch) -> Names:
    place.immich.config["machineLearning"]["urls"] = [f"http://ml.example:{PORT}"]
    return Names(monkeypatch)


@pytest.mark.parametrize(("fails", "hangs_s"), [(True, 0.0), (False, 3.0)])
async def test_a_stop_pauses_the_queues_although_no_name_can_be_looked_up(
    place: Place, names: Names, fails: bool, hangs_s: float
) -> None:
    async with place.guard() as (guard, running):
        await is_on(guard)
        names.fails, names.hangs_s = fails, hangs_s
        assert await end(guard, running)
    assert place.immich.paused == QUEUES


async def test_a_queue_paused_for_a_trouble_stays_so_while_no_name_can_be_looked_up(
    place: Place, names: Names
) -> None:
    place.ours.troubles = dict(BROKEN)
    async with place.guard() as (guard, _):
        await until(lambda: place.immich.paused == {"ocr"}, "the pause of a broken task")
        names.fails, asked = True, names.asked
        await until(lambda: names.asked > asked + 2, "more looks at Immich's URLs")
        assert place.immich.paused == {"ocr"}
        assert guard.describe()["state"] == "on"


# -- Immich against it -----------------------------------------------------------------------------


async def test_a_resume_that_fails_at_the_start_is_tried_until_it_succeeds(place: Place) -> None:
    place.remember(paused={task: Pause(STOPPED, SINCE) for task in ("clip", "ocr")})
    place.immich.queues["smartSearch"].is_paused = place.immich.queues["ocr"].is_paused = True
    place.immich.fails["GET"] = 502
    async with place.guard() as (guard, _):
        await until(lambda: "502" in guard.describe()["last_trouble_with_immich"])
        place.immich.fails = {"resume ocr": 500, "resume smartSearch": 500}
        await until(lambda: "500" in guard.describe()["last_trouble_with_immich"])
        assert place.immich.paused == {"smartSearch", "ocr"}
        place.immich.fails = {}
        await until(lambda: not place.immich.paused, "resumed queues")
        await until(lambda: not Records.load(place.folder).paused, "no pause in the records")


async def test_a_queue_that_cannot_be_resumed_keeps_no_other_from_being_paused(
    place: Place,
) -> None:
    place.remember(paused={"clip": Pause(STOPPED, SINCE)})
    place.immich.queues["smartSearch"].is_paused = True
    place.immich.fails["resume smartSearch"] = 500
    place.ours.troubles = dict(BROKEN)
    async with place.guard():
        await until(lambda: "ocr" in place.immich.paused, "the pause of a broken task")


async def test_one_bad_answer_to_the_try_of_the_key_is_no_refusal(place: Place) -> None:
    place.immich.fails["resume smartSearch"] = 500
    async with place.guard() as (guard, running):
        await until(lambda: "500" in guard.describe()["last_trouble_with_immich"])
        assert await end(guard, running)
    assert place.immich.paused == QUEUES


async def test_a_key_that_is_revoked_while_a_queue_is_paused_is_said_until_there_is_a_new_one(
    place: Place,
) -> None:
    place.ours.troubles = dict(BROKEN)
    async with place.guard() as (guard, _):
        await until(lambda: place.immich.paused == {"ocr"}, "the pause of a broken task")
        place.immich.fails["GET"] = 401
        place.ours.troubles = {}
        await until(lambda: "no such key (401)" in guard.describe()["last_trouble_with_immich"])
        assert guard.describe()["paused"].keys() == {"ocr"}
        place.immich.fails = {}
        await until(lambda: not place.immich.paused, "resumed queues")


async def test_machine_learning_that_is_switched_off_lets_our_pauses_go(place: Place) -> None:
    place.ours.troubles = dict(BROKEN)
    async with place.guard():
        await until(lambda: place.immich.paused == {"ocr"}, "the pause of a broken task")
        place.immich.config["machineLearning"]["enabled"] = False
        await until(lambda: not place.immich.paused, "resumed queues")


async def test_a_run_that_immich_refuses_keeps_no_other_from_being_asked_for(
    place: Place,
) -> None:
    place.remember(running_since=SINCE)
    place.immich.fails["start smartSearch"] = 500
    async with place.guard() as (guard, _):
        await until(lambda: len(place.immich.started) == 2, "two runs")
        assert "500" in guard.describe()["missing_runs"]["smartSearch"]["waits_for"]
        place.immich.fails = {}
        await until(lambda: len(place.immich.started) == 3, "three runs")


def answering(status: int, content: str, **headers: str) -> Starlette:
    async def answer(_: Request) -> Response:
        return Response(content, status, headers)

    return Starlette(routes=[Route("/{path:path}", answer, methods=["GET", "PUT"])])


@pytest.mark.parametrize(
    ("app", "said"),
    [
        (answering(401, ""), "no such key"),
        (answering(403, "{}"), "it lacks"),
        (answering(404, "{}"), "answered 404"),
        (answering(500, "<html>"), "answered 500"),
        (answering(301, "", location="https://photos.example/"), "answered 301"),
        (answering(200, "<html>"), "is not Immich's API"),
        (answering(200, "[]"), "of an unknown shape"),
        (answering(200, '"text"'), "of an unknown shape"),
        (answering(200, "null"), "of an unknown shape"),
        (answering(200, '{"machineLearning": [], "smartSearch": 7}'), "of an unknown shape"),
    ],
)
def test_whatever_answers_in_immichs_place_is_said_in_one_line(
    loopback: Callable[[Any], str], app: Starlette, said: str
) -> None:
    with closing(ImmichApi(loopback(app), SecretStr("k"))) as immich:
        for ask in (immich.settings, immich.queues):
            with pytest.raises(ImmichError, match=said):
                ask()


def test_older_servers_have_one_url_and_no_ocr(place: Place) -> None:
    learning = place.immich.config["machineLearning"]
    learning["url"] = learning.pop("urls")[0]
    del learning["ocr"], place.immich.queues["ocr"]
    with closing(ImmichApi(place.url, SecretStr(KEY))) as immich:
        assert immich.settings().urls == (f"http://127.0.0.1:{PORT}",)
        assert immich.queues().keys() == {"clip", "facial-recognition", "duplicateDetection"}


async def test_a_key_that_was_pasted_with_quotes_is_refused_and_never_shown(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    async with place.guard(key="\u201csecret\u201d") as (guard, _):
        await until(lambda: "letters that no key has" in str(guard.describe()))
        assert "secret" not in str(guard.describe()) + caplog.text


@pytest.mark.parametrize(
    ("refused", "said"), [("key", "no such key (401)"), ("systemConfig.read", "systemConfig.read")]
)
async def test_a_key_that_is_refused_from_the_start_is_why_the_guard_is_off(
    place: Place, refused: str, said: str
) -> None:
    place.immich.permissions.discard(refused)
    async with place.guard("wrong" if refused == "key" else KEY) as (guard, _):
        await until(lambda: said in guard.describe()["why_off"], "the refusal")
        assert guard.describe()["state"] == "off"
        place.immich.permissions.add(refused)
        if refused != "key":
            await is_on(guard)


async def test_an_immich_that_does_not_name_us_is_not_asked_all_the_time(place: Place) -> None:
    place.remember(running_since=SINCE)
    place.immich.config["machineLearning"]["urls"] = ["http://192.0.2.1:3003"]
    async with place.guard() as (guard, _):
        await until(lambda: "do not name" in guard.describe()["why_off"], "a look at Immich")
        assert guard._missing.has_work()
        guard._times = replace(TIMES, look_s=60.0)
        await until(lambda: guard._looked_s > 0, "the end of that look")
        looked_s = guard._looked_s
        await asyncio.sleep(0.3)
        assert guard._looked_s == looked_s


# -- the disk against it ---------------------------------------------------------------------------


async def test_records_that_cannot_be_written_for_a_while_are_written_later(place: Place) -> None:
    aside = place.folder.path.with_name("aside")
    async with place.guard() as (guard, running):
        await is_on(guard)
        place.folder.path.rename(aside)
        place.folder.path.touch()
        place.ours.troubles = dict(BROKEN)
        await until(lambda: "no queue is paused" in guard.describe()["why_off"])
        await asyncio.sleep(0.3)
        assert guard.describe()["state"] == "off"
        assert place.immich.paused == set()
        place.folder.path.unlink()
        aside.rename(place.folder.path)
        await until(lambda: place.immich.paused == {"ocr"}, "the pause of a broken task")
        assert Records.load(place.folder).paused.keys() == {"ocr"}
        assert await end(guard, running)


async def test_an_older_save_never_comes_after_a_later_one(place: Place) -> None:
    keeper = Keeper(ImmichApi(place.url, SecretStr(KEY)), place.folder)
    await keeper.open()
    keeper.records.running_since = "later"
    keeper._write({"paused": {}, "running_since": "later"}, 2)
    keeper._write({"paused": {}, "running_since": "earlier"}, 1)
    assert Records.load(place.folder).running_since == "later"
    keeper.close()
    keeper.immich.close()


@pytest.mark.parametrize(
    "document",
    [
        {"paused": {"video": {"reason": "r", "since": "s"}}},
        {"repairs": {"ocr": {"lost": "many"}}},
        {"repairs": {"ocr": {"rests_until_s": "soon"}}},
        {"repairs": {"clip": {"unheard_of": 1}}},
        {"paused": ["ocr"]},
    ],
)
def test_records_of_another_shape_are_damaged(place: Place, document: dict[str, Any]) -> None:
    place.folder.write(DOCUMENT, VERSION, document)
    with pytest.raises(StateUnusable, match="is damaged"):
        Records.load(place.folder)


def test_records_of_a_newer_release_are_left_alone(place: Place) -> None:
    place.folder.write(DOCUMENT, VERSION + 1, {})
    with pytest.raises(StateUnusable, match="newer release"):
        Records.load(place.folder)
