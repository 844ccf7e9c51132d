"""Immich's side, against a double built from its documented API."""

import asyncio
import copy
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from doubles.immich import CONFIG, KEY, ImmichDouble
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
from immich_ml_metal.immich.our_side import measure_gains, measure_search_delay
from immich_ml_metal.types import Task

Loopback = Callable[[Any], str]


def busy() -> ImmichDouble:
    immich = ImmichDouble()
    immich.queues["smartSearch"].waiting.extend(range(40))
    immich.queues["smartSearch"].active = 2
    immich.queues["faceDetection"].failed = 1
    return immich


def run(url: str, *args: str, key: str = KEY, port: int = 3003) -> Any:
    env = {"ML_IMMICH_URL": url, "ML_IMMICH_API_KEY": key, "COLUMNS": "150", "ML_PORT": str(port)}
    return CliRunner(env=env).invoke(app, ["immich", *args])


def test_status_shows_models_queues_and_concurrency(loopback: Loopback) -> None:
    result = run(loopback(busy().app), "status", port=1)
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["clip", "ViT-B-32__openai", "2", "2", "40", "-", "-"] in lines
    assert ["facial-recognition", "buffalo_l", "2", "0", "0", "-", "-"] in lines
    assert "Immich 3.1.0" in result.stdout
    assert "our service is not running" in result.stdout
    assert 'Immich\'s own "failed" column is always 0' in result.stdout
    assert "smart search runs 2 at once: more may be faster" in result.stdout


def test_status_as_json_and_a_foreign_url_is_a_finding(loopback: Loopback) -> None:
    immich = busy()
    immich.config["machineLearning"]["urls"] = ["http://immich-machine-learning:3003"]
    result = run(loopback(immich.app) + "/api", "status", "--json")
    report = json.loads(result.stdout)
    assert result.exit_code == 1
    assert report["server"]["models"]["ocr"] == "PP-OCRv5_mobile"
    clip = report["queues"]["clip"]
    assert (clip["active"], clip["waiting"], clip["paused_by"]) == (2, 40, "")
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


def test_a_busy_queue_does_not_keep_requeue_from_the_others(loopback: Loopback) -> None:
    immich = busy()
    result = run(loopback(immich.app), "requeue")
    assert result.exit_code == 1
    assert [name for name, _ in immich.started] == ["faceDetection", "ocr"]
    assert "smartSearch works just now" in result.stdout


@pytest.mark.parametrize("permission", ["systemConfig.read", "job.read"])
def test_a_refusal_names_the_permission_that_the_key_lacks(
    loopback: Loopback, permission: str
) -> None:
    immich = ImmichDouble()
    immich.permissions.discard(permission)
    result = run(loopback(immich.app), "status")
    assert result.exit_code == 3
    assert f"it lacks {permission}" in result.stderr


def test_a_refused_command_names_the_permission_that_the_key_lacks(loopback: Loopback) -> None:
    immich = ImmichDouble()
    immich.permissions.discard("job.create")
    assert "it lacks job.create" in run(loopback(immich.app), "requeue").stderr


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
    gains: dict[str, float] = {Task.CLIP: 1.64, Task.FACES: 1.0, Task.OCR: 0.98}
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


GAINS: dict[str, float] = {Task.CLIP: 1.18, Task.FACES: 1.0, Task.OCR: 0.98}


@pytest.mark.parametrize(
    ("search_s", "said"),
    [
        ((0.38, 1.5), "leave it, unless nobody searches meanwhile"),
        ((0.10, 0.3), "raise it to 8, measured here: 1.2 times the throughput"),
    ],
)
def test_more_at_once_is_advised_only_where_searches_stay_quick(
    search_s: tuple[float, float], said: str
) -> None:
    ours = replace(OURS, gains=GAINS, search_s=search_s)
    (advice,) = [a.text for a in advise(parse_settings(CONFIG), ours) if "at once" in a.text]
    assert said in advice
    assert f"takes {search_s[1]:.2f} s instead of {search_s[0]:.2f} s" in advice


def test_the_resize_rule_is_mentioned_only_for_models_that_it_concerns() -> None:
    server, ours = parse_settings(CONFIG, "3.2.0"), replace(OURS, immich_compat="3.3")
    assert any("immich_compat" in a.text for a in advise(server, ours))
    ours = replace(ours, squashes=lambda _: False)
    assert not any("immich_compat" in a.text for a in advise(server, ours))


def test_searches_are_timed_beside_the_queues(loopback: Loopback) -> None:
    async def predict(request: Request) -> Response:
        async with request.form() as form:
            is_picture = "image" in form
        await asyncio.sleep(0.05 if is_picture else 0.01)
        return JSONResponse({"clip": "[1.0]"})

    url = loopback(Starlette(routes=[Route("/predict", predict, methods=["POST"])]))
    server = replace(parse_settings(CONFIG), models={"clip": "ViT-B-32__openai"})
    measured = measure_search_delay(url, server, lambda seed: bytes([seed]))
    assert measured is not None
    assert all(0.01 <= seconds < 5 for seconds in measured)


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
