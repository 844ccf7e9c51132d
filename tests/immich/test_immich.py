"""Immich's side, against a double built from its documented API."""

import asyncio
import copy
import json
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from doubles.immich import CONFIG, KEY, ImmichDouble
from doubles.timing import Clock
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from typer.testing import CliRunner

from immich_ml_metal.cli import app
from immich_ml_metal.errors import ConfigError
from immich_ml_metal.immich.advice import OurSide, advise
from immich_ml_metal.immich.api import ImmichApi, connect, parse_settings
from immich_ml_metal.immich.gain import measure_gains
from immich_ml_metal.immich.requeue import RequeuePolicy, tasks_of
from immich_ml_metal.immich.requeuer import Requeuer, make_requeuer
from immich_ml_metal.settings import Settings
from immich_ml_metal.types import Task

Loopback = Callable[[Any], str]


def run(url: str, *args: str, key: str = KEY, port: int = 3003) -> Any:
    env = {"ML_IMMICH_URL": url, "ML_IMMICH_API_KEY": key, "COLUMNS": "150", "ML_PORT": str(port)}
    return CliRunner(env=env).invoke(app, ["immich", *args])


def test_status_shows_models_queues_and_concurrency(loopback: Loopback) -> None:
    result = run(loopback(ImmichDouble().app), "status", port=1)
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["clip", "ViT-B-32__openai", "2", "2", "40", "0"] in lines
    assert ["facial-recognition", "buffalo_l", "2", "0", "0", "1"] in lines
    assert "Immich 3.1.0" in result.stdout
    assert "our service is not running" in result.stdout
    assert "smart search runs 2 at once: raise it to 8" in result.stdout


def test_status_as_json_and_a_foreign_url_is_a_finding(loopback: Loopback) -> None:
    immich = ImmichDouble()
    immich.config["machineLearning"]["urls"] = ["http://immich-machine-learning:3003"]
    result = run(loopback(immich.app) + "/api", "status", "--json")
    report = json.loads(result.stdout)
    assert result.exit_code == 1
    assert report["server"]["models"]["ocr"] == "PP-OCRv5_mobile"
    assert report["queues"]["clip"] == {
        "active": 2,
        "waiting": 40,
        "failed": 0,
        "is_paused": False,
    }
    assert "looks like this machine" in report["advice"][0]["text"]


def test_status_counts_the_answers_we_failed(loopback: Loopback) -> None:
    async def metrics(_: Request) -> Response:
        lines = [
            "# TYPE immich_ml_http_requests_total counter",
            'immich_ml_http_requests_total{path="/predict",process="gateway",status="503"} 7.0',
            'immich_ml_http_requests_total{path="/predict",process="gateway",status="200"} 90.0',
            'immich_ml_http_requests_total{path="/predict",process="gateway",status="400"} 2.0',
        ]
        return PlainTextResponse("\n".join(lines) + "\n")

    ours = loopback(Starlette(routes=[Route("/metrics", metrics)]))
    port = int(ours.rpartition(":")[2])
    result = run(loopback(ImmichDouble().app), "status", "--json", port=port)
    assert json.loads(result.stdout)["answers_failed_since_start"] == 7


def test_requeue_starts_the_missing_runs_without_force(loopback: Loopback) -> None:
    immich = ImmichDouble()
    result = run(loopback(immich.app), "requeue")
    start = {"command": "start", "force": False}
    assert result.exit_code == 0
    assert immich.started == [("smartSearch", start), ("faceDetection", start), ("ocr", start)]


def test_requeue_of_one_task(loopback: Loopback) -> None:
    immich = ImmichDouble()
    run(loopback(immich.app), "requeue", "--task", "ocr")
    assert [name for name, _ in immich.started] == ["ocr"]
    assert run("http://127.0.0.1:1", "requeue", "--task", "people").exit_code == 2


@pytest.mark.parametrize("command", ["status", "requeue"])
def test_a_wrong_key_is_said_without_showing_it(loopback: Loopback, command: str) -> None:
    result = run(loopback(ImmichDouble().app), command, key="wrong-key")
    assert result.exit_code == 3
    assert "refuses the API key" in result.stderr
    assert "wrong-key" not in result.output


def test_an_unreachable_server_is_its_own_exit_code() -> None:
    result = run("http://127.0.0.1:1", "status")
    assert result.exit_code == 3
    assert "cannot reach Immich at http://127.0.0.1:1" in result.stderr


def test_something_else_than_immich_is_said(loopback: Loopback) -> None:
    async def page(_: Request) -> Response:
        return PlainTextResponse("<html>")

    url = loopback(Starlette(routes=[Route("/api/system-config", page)]))
    assert "is not Immich's API" in run(url, "status").stderr


def test_settings_of_an_unknown_shape_are_refused(loopback: Loopback) -> None:
    immich = ImmichDouble()
    del immich.config["machineLearning"]["enabled"]
    assert "unknown shape" in run(loopback(immich.app), "status").stderr


def test_the_key_is_in_no_representation() -> None:
    api = ImmichApi("http://nas:2283/api/", SecretStr(KEY))
    assert repr(api) == "<ImmichApi http://nas:2283>"
    api.close()


@pytest.mark.parametrize(("url", "key"), [(None, SecretStr("k")), ("http://nas", None)])
def test_a_missing_setting_is_named(url: str | None, key: SecretStr | None) -> None:
    with pytest.raises(ConfigError, match="immich_url" if url is None else "immich_api_key"):
        connect(url, key)


def test_an_old_server_with_one_url_and_no_ocr_is_understood() -> None:
    config = copy.deepcopy(CONFIG)
    learning = config["machineLearning"]
    learning["url"] = learning.pop("urls")[0]
    del learning["ocr"], learning["availabilityChecks"]
    server = parse_settings(config)
    assert server.urls == ("http://mac.local:3003",)
    assert set(server.models) == {Task.CLIP, Task.FACES}


# -- advice ----------------------------------------------------------------------------------------

OURS = OurSide(3003, frozenset({"mac.local"}), "3.2", lambda *_: "")


def texts(config: dict[str, Any], ours: OurSide = OURS, version: str = "3.1.0") -> list[str]:
    return [advice.text for advice in advise(parse_settings(config, version), ours)]


def test_a_well_set_server_needs_no_advice() -> None:
    config = copy.deepcopy(CONFIG)
    for name, count in (("smartSearch", 8), ("faceDetection", 4), ("ocr", 4)):
        config["job"][name]["concurrency"] = count
    assert texts(config) == []


def test_a_measured_gain_is_told_and_no_gain_is_no_advice() -> None:
    gains = {Task.CLIP: 1.64, Task.FACES: 1.0, Task.OCR: 0.98}
    ours = OurSide(3003, OURS.hosts, "3.2", lambda *_: "", gains=gains)
    said = texts(CONFIG, ours)
    assert said == [
        "smart search runs 2 at once: raise it to 8, measured here: 1.6 times the throughput"
    ]


def test_a_model_we_do_not_serve_is_a_fault_and_comes_first() -> None:
    why = {Task.OCR: "no official model has this name"}
    ours = OurSide(3003, OURS.hosts, "3.2", lambda task, _: why.get(task, ""))
    found = advise(parse_settings(CONFIG), ours)
    assert found[0].is_fault
    assert found[0].text == "OCR asks for PP-OCRv5_mobile: no official model has this name"


def test_apple_vision_instead_of_the_named_model_is_said() -> None:
    ours = OurSide(3003, OURS.hosts, "3.2", lambda *_: "", engines={Task.OCR: "vision"})
    assert any(
        "PP-OCRv5_mobile, which the engine vision does not run" in t for t in texts(CONFIG, ours)
    )


@pytest.mark.parametrize(
    ("version", "compat", "said"),
    [("3.1.0", "3.3", True), ("3.1.0", "3.2", False), ("3.3.1", "3.2", True), ("", "3.2", False)],
)
def test_the_resize_rule_is_compared_with_the_server(version: str, compat: Any, said: bool) -> None:
    ours = OurSide(3003, OURS.hosts, compat, lambda *_: "")
    assert any("immich_compat" in text for text in texts(CONFIG, ours, version)) is said


def test_a_second_place_and_a_switched_off_server_are_noticed() -> None:
    config = copy.deepcopy(CONFIG)
    config["machineLearning"]["urls"] = ["http://nas:3003", "http://mac.local:3003"]
    config["machineLearning"]["enabled"] = False
    said = texts(config)
    assert said[0] == "machine learning is switched off in Immich's settings"
    assert any(text.startswith("http://nas:3003 is asked first") for text in said)


# -- the requeue policy ----------------------------------------------------------------------------


def test_nothing_lost_means_nothing_due() -> None:
    policy = RequeuePolicy()
    policy.answered([Task.CLIP], 200, 0)
    policy.answered([Task.CLIP], 400, 1)
    assert policy.due(1e6) == ()


def test_a_run_is_due_once_answers_have_been_good_for_a_while() -> None:
    policy = RequeuePolicy(settled_s=60)
    policy.answered([Task.CLIP, Task.OCR], 503, 0)
    assert policy.due(1000) == ()  # still down, for all we know
    policy.answered([Task.CLIP], 200, 1000)
    assert policy.due(1059) == ()
    assert policy.due(1060) == (Task.CLIP, Task.OCR)


def test_a_new_failure_starts_the_wait_again() -> None:
    policy = RequeuePolicy(settled_s=60)
    policy.answered([Task.CLIP], 503, 0)
    policy.answered([Task.CLIP], 200, 10)
    policy.answered([Task.CLIP], 500, 50)
    assert policy.due(200) == ()
    policy.answered([Task.CLIP], 200, 200)
    assert policy.due(260) == (Task.CLIP,)


def test_one_run_per_outage_and_none_soon_after() -> None:
    policy = RequeuePolicy(settled_s=60, pause_s=3600)
    policy.answered([Task.CLIP], 503, 0)
    policy.answered([Task.CLIP], 200, 1)
    policy.started(Task.CLIP, 61)
    assert policy.due(100) == ()
    policy.answered([Task.CLIP], 503, 200)  # a photo of the run kills the engine again
    policy.answered([Task.CLIP], 200, 201)
    assert policy.due(1000) == ()
    assert policy.due(61 + 3600) == (Task.CLIP,)


def test_a_run_that_immich_did_not_take_stays_due() -> None:
    policy = RequeuePolicy(settled_s=0)
    policy.answered([Task.OCR], 500, 0)
    policy.answered([Task.OCR], 200, 1)
    assert policy.due(2) == policy.due(3) == (Task.OCR,)


@given(st.lists(st.tuples(st.sampled_from([200, 400, 503]), st.floats(0, 100)), max_size=40))
def test_however_it_goes_runs_of_a_task_are_never_closer_than_the_pause(
    steps: list[tuple[int, float]],
) -> None:
    policy, now_s, runs = RequeuePolicy(settled_s=30, pause_s=500), 0.0, []
    for status, wait_s in steps:
        now_s += wait_s
        policy.answered([Task.CLIP], status, now_s)
        for task in policy.due(now_s):
            policy.started(task, now_s)
            runs.append(now_s)
    assert all(later - earlier >= 500 for earlier, later in pairwise(runs))


def test_a_refused_run_is_tried_again_only_later() -> None:
    policy = RequeuePolicy(settled_s=60)
    policy.answered([Task.OCR], 500, 0)
    policy.answered([Task.OCR], 200, 1)
    policy.refused(100)
    assert policy.due(159) == ()
    assert policy.due(160) == (Task.OCR,)


@pytest.mark.parametrize(
    ("body", "tasks"),
    [
        (b'--x\r\nname="entries"\r\n\r\n{"ocr":{"detection":{}}}', (Task.OCR,)),
        (b'{"facial-recognition":{}}' + b"\xff" * 9000 + b'"clip"', (Task.FACES,)),
        (b"\x00garbage", tuple(Task)),
    ],
)
def test_the_tasks_are_found_in_the_unread_body(body: bytes, tasks: tuple[Task, ...]) -> None:
    assert tasks_of(body) == tasks


CLIP_BODY = b'{"clip":{"visual":{}}}'


def make(connect_to: Callable[[], ImmichApi], clock: Clock, started: list[int]) -> Requeuer:
    policy = RequeuePolicy(settled_s=60)
    return Requeuer(connect_to, lambda: started.append(1), policy=policy, clock=clock)


async def test_after_an_outage_immich_is_asked_once(loopback: Loopback) -> None:
    immich, clock, started = ImmichDouble(), Clock(0), list[int]()
    url = loopback(immich.app)
    requeuer = make(lambda: ImmichApi(url, SecretStr(KEY)), clock, started)
    for _ in range(79):
        requeuer.answered(CLIP_BODY, 503)
    requeuer.answered(CLIP_BODY, 200)
    await requeuer.tick()
    assert immich.started == []
    clock.now_s = 61
    await requeuer.tick()
    await requeuer.tick()
    assert [name for name, _ in immich.started] == ["smartSearch"]
    assert started == [1]


async def test_an_immich_that_is_down_as_well_is_asked_later(loopback: Loopback) -> None:
    immich, clock, started = ImmichDouble(), Clock(0), list[int]()
    urls = ["http://127.0.0.1:1", loopback(immich.app)]
    requeuer = make(lambda: ImmichApi(urls.pop(0), SecretStr(KEY)), clock, started)
    requeuer.answered(CLIP_BODY, 500)
    requeuer.answered(CLIP_BODY, 200)
    clock.now_s = 61
    await requeuer.tick()
    await requeuer.tick()
    assert (immich.started, len(urls)) == ([], 1)
    clock.now_s = 130
    await requeuer.tick()
    assert len(immich.started) == 1


def test_the_requeuer_is_there_only_when_asked_for_and_needs_a_key() -> None:
    assert make_requeuer(Settings(), lambda: None) is None
    with pytest.raises(ConfigError, match="immich_url"):
        make_requeuer(Settings(immich_requeue=True), lambda: None)
    whole = Settings(
        immich_requeue=True,
        immich_url="http://nas:2283",
        immich_api_key="k",  # type: ignore[arg-type]
    )
    assert isinstance(make_requeuer(whole, lambda: None), Requeuer)


# -- the measured gain -----------------------------------------------------------------------------


def test_the_gain_is_measured_and_a_task_that_fails_is_left_out(loopback: Loopback) -> None:
    async def predict(request: Request) -> Response:
        async with request.form() as form:
            (task,) = json.loads(str(form["entries"]))
        if task != "clip":
            return PlainTextResponse("Internal Server Error", 500)
        await asyncio.sleep(0.05)  # as if each answer took a while but did not hinder the others
        return JSONResponse({"clip": "[1.0]"})

    url = loopback(Starlette(routes=[Route("/predict", predict, methods=["POST"])]))
    gains = measure_gains(url, parse_settings(CONFIG), lambda seed: bytes([seed]))
    assert set(gains) == {Task.CLIP}
    assert gains[Task.CLIP] > 1.5
