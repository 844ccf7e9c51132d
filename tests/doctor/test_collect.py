"""Doctor on this machine, really broken in the ways that a test can break it."""

import json
import socket
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from doubles.tiny_models import CLIP, FACES, OCR, make_models
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from typer.testing import CliRunner

from immich_ml_metal.backends.selection import Candidate
from immich_ml_metal.cli import app
from immich_ml_metal.client.calls import ModelNames
from immich_ml_metal.client.own_service import ask_health
from immich_ml_metal.doctor import collect
from immich_ml_metal.doctor.checks import Finding
from immich_ml_metal.doctor.facts import Facts, Outcome, Port
from immich_ml_metal.doctor.selftest import run_tests
from immich_ml_metal.doctor.share import anonymise, known_private, write_bundle
from immich_ml_metal.qualification.record import Record
from immich_ml_metal.qualification.verdict import Figures, Judged, Verdict
from immich_ml_metal.qualification.verdict import Outcome as Found
from immich_ml_metal.settings import Settings
from immich_ml_metal.state import StateFolder
from immich_ml_metal.system.network import url_host, usable
from immich_ml_metal.system.programs import Completed
from immich_ml_metal.types import ModelKey, Part, Task

Loopback = Callable[[Any], str]
PMSET = """Battery Power:
 sleep                1
 displaysleep         2
AC Power:
 womp                 1
 sleep                10 (sleep prevented by caffeinate)
"""


def nothing(*args: str) -> Completed:
    return Completed(127)


def json_app(**answers: Any) -> Starlette:
    def route(path: str, answer: Any) -> Route:
        async def reply(_: Request) -> Response:
            return JSONResponse(answer)

        return Route(path, reply)

    return Starlette(routes=[route(f"/{k.strip('_')}", v) for k, v in answers.items()])


@pytest.fixture
def held_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield sock.getsockname()[1]


def port_of(url: str) -> int:
    return int(url.rpartition(":")[2])


def doctor(home: Path, *args: str, **env: str) -> dict[str, Any]:
    environment = {"HOME": str(home), "ML_OFFLINE": "1", "ML_MODELS_DIR": str(home / "m"), **env}
    run = CliRunner(env=environment).invoke
    result = run(app, ["doctor", "--json", "--no-test", *args])
    assert result.exit_code in (0, 1), result.output
    report: dict[str, Any] = json.loads(result.stdout)
    assert (report["cause"] is None) == (result.exit_code == 0)
    return report


def found(report: dict[str, Any], name: str) -> dict[str, str]:
    check: dict[str, str] = next(c for c in report["checks"] if c["name"] == name)
    return check


def test_offline_without_models_is_the_first_cause(tmp_path: Path) -> None:
    report = doctor(tmp_path, ML_PORT="1")
    assert report["cause"] == "hub"
    assert found(report, "models")["follows"] == "hub"
    assert [c["name"] for c in report["checks"] if c["level"] == "fail"] == ["hub"]


def test_a_foreign_program_on_the_port_is_named(tmp_path: Path, held_port: int) -> None:
    port = found(doctor(tmp_path, ML_PORT=str(held_port)), "port")
    assert port["level"] == "fail"
    assert f"{held_port} is held by" in port["text"]
    assert "process" in port["text"]


def test_a_broken_settings_file_is_the_first_cause(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text("face_min_score = 7\n")
    report = doctor(tmp_path, "--config", str(file))
    assert report["cause"] == "settings"
    assert "face_min_score" in found(report, "settings")["text"]
    assert found(report, "hub")["text"] == "not asked, as the settings are refused"
    assert found(report, "hub")["follows"] == "settings"


def test_a_damaged_model_is_named_with_its_file(tmp_path: Path) -> None:
    graph = tmp_path / "m" / "facial-recognition" / "buffalo_l" / "detection" / "model.onnx"
    graph.parent.mkdir(parents=True)
    graph.write_bytes(b"<html>429 Too Many Requests</html>")
    models = collect.read_models(Settings(models_dir=tmp_path / "m"), ["buffalo_l"], digests=False)
    assert models[0].problem == "detection/model.onnx is damaged"


def test_an_unknown_model_name_is_a_problem(tmp_path: Path) -> None:
    (model,) = collect.read_models(Settings(models_dir=tmp_path), ["buffalo_xl"], digests=False)
    assert "buffalo_xl" in model.problem


def test_a_missing_model_is_not_called_damaged(tmp_path: Path) -> None:
    (model,) = collect.read_models(Settings(models_dir=tmp_path), ["buffalo_l"], digests=False)
    assert (model.is_present, model.problem) == (False, "")


def test_a_model_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    error, free_bytes = collect.read_folder(tmp_path / "file" / "models")
    assert error
    assert free_bytes > 0
    assert collect.read_folder(tmp_path / "new" / "deep")[0] == ""


@pytest.mark.parametrize(
    ("answers", "state", "version"),
    [
        ({"_": {"message": "Immich ML"}, "health": {"version": "0.0.9"}}, "ours", "0.0.9"),
        ({"_": {"message": "Immich ML"}}, "other_ml", ""),
        ({"_": {"message": "hello"}}, "taken", ""),
        ({}, "taken", ""),
    ],
    ids=["ours", "official", "something else", "404"],
)
def test_who_holds_the_port_is_told_apart(
    loopback: Loopback, answers: dict[str, Any], state: str, version: str
) -> None:
    port = port_of(loopback(json_app(**answers)))
    seen = collect.read_port(Settings(port=port), nothing)
    assert (seen.state, seen.version) == (state, version)


@pytest.mark.parametrize(
    "health",
    [
        {"version": "0.2.0", "engines": {"clip/visual": "mlx"}},
        {
            "versions": {"service": "0.2.0"},
            "worker": {"state": "ready", "health": {"engines": {"clip/visual": "mlx"}}},
        },
    ],
    ids=["worker alone", "gateway"],
)
def test_both_forms_of_health_are_understood(loopback: Loopback, health: dict[str, Any]) -> None:
    seen = ask_health(loopback(json_app(_={"message": "Immich ML"}, health=health)))
    assert (seen.version, dict(seen.engines)) == ("0.2.0", {"clip/visual": "mlx"})


def test_a_gateway_whose_engine_sleeps_names_no_engines(loopback: Loopback) -> None:
    health = {"versions": {"service": "0.2.0"}, "engine": {"state": "idle"}}
    seen = ask_health(loopback(json_app(_={"message": "Immich ML"}, health=health)))
    assert (seen.version, dict(seen.engines)) == ("0.2.0", {})


def test_a_free_port_is_free() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    assert collect.read_port(Settings(port=port), nothing) == Port(port, "free")


def test_the_holder_is_read_from_lsof_where_there_is_one(held_port: int) -> None:
    def lsof(*args: str) -> Completed:
        return Completed(0, "p812\ncnode\nf21\n")

    assert collect.read_port(Settings(port=held_port), lsof).holder == "node, process 812"


def test_the_hub_is_asked_and_tells_the_time(loopback: Loopback, held_port: int) -> None:
    import time

    url = loopback(json_app(_={}))
    problem, skew_s = collect.read_hub(Settings(), url, time.time() - 500)
    assert problem == ""
    assert skew_s == pytest.approx(-500, abs=5)
    assert collect.read_hub(Settings(offline=True), url, 0) == ("offline", None)
    problem, skew_s = collect.read_hub(Settings(), "http://127.0.0.1:1", 0)
    assert "not reachable" in problem
    assert skew_s is None
    assert collect.clock_skew("no date", 0) is None


def test_sleep_on_mains_power_is_read() -> None:
    assert collect.parse_sleep(PMSET) == 10
    assert collect.parse_sleep("") is None


def test_only_addresses_others_can_use_are_told_ipv4_first() -> None:
    given = ["fe80::1", "127.0.0.1", "fd00::2", "192.168.1.9", "169.254.1.1", "::1", "10.0.0.2"]
    assert usable(given) == ["10.0.0.2", "192.168.1.9", "fd00::2"]
    assert [url_host(a) for a in usable(given)][-1] == "[fd00::2]"


def test_choices_are_told_with_what_was_measured_and_a_memory_that_is_lost(tmp_path: Path) -> None:
    make_models(tmp_path)
    settings = Settings(
        models_dir=tmp_path,
        state_dir=tmp_path / "state",
        clip_model=CLIP,
        face_model=FACES,
        ocr_model=OCR,
    )
    key, cpu = ModelKey(Task.CLIP, Part.VISUAL, CLIP), Candidate("cpu")
    verdict = Verdict(Found.RIGHT, figures=Figures(cosine=0.99999, alone_ms=8.6))
    record = Record(StateFolder(tmp_path / "state"))
    record.change(key, lambda old: old.with_verdict(Judged(cpu, verdict, {})))
    told = [one.told for one in collect.read_choices(settings)]
    assert f"{CLIP}/visual on cpu float32, cosine 0.9999900, 9 ms" in told
    assert f"{FACES}/detection on cpu float32" in told
    (tmp_path / "state" / "engines.json").write_text("{")
    assert "are not remembered" in collect.read_choices(settings)[-1].warning


# -- the live self-test ----------------------------------------------------------------------------


def fake_service(
    vector: list[float], lines: list[str], health: dict[str, Any] | None = None
) -> Starlette:
    """A service that tells its engines from the first question on where `health` is given empty."""
    health = {"engines": ENGINES} if health is None else health
    read = {"text": lines, "box": [0.0] * 8 * len(lines), "textScore": [1.0] * len(lines)}

    async def predict(request: Request) -> Response:
        async with request.form() as form:
            (task,) = json.loads(str(form["entries"]))
        health["engines"] = ENGINES
        if task == "clip":
            return JSONResponse({"clip": json.dumps(vector)})
        return JSONResponse({task: read if task == "ocr" else []})

    about = json_app(_={"message": "Immich ML"}, health=health)
    return Starlette(routes=[*about.routes, Route("/predict", predict, methods=["POST"])])


NAMES = ModelNames("ViT-B-32__openai", "buffalo_l", "PP-OCRv6_small")
ENGINES = {"clip/visual": "mlx", "clip/textual": "mlx", "facial-recognition/detection": "vision"}


def test_every_task_is_asked(loopback: Loopback) -> None:
    url = loopback(fake_service([0.6, 0.8], ["a"]))
    tests = run_tests(url, (), NAMES, b"picture")
    assert [(t.engine, t.error) for t in tests] == [
        ("mlx", ""),
        ("mlx", ""),
        ("vision", ""),
        ("?", ""),
    ]


def test_wrong_answers_are_failures(loopback: Loopback) -> None:
    url = loopback(fake_service([3.0, 4.0], []))
    pictures, texts, faces, text = run_tests(url, (), NAMES, b"picture")
    assert pictures.error == texts.error == "its vector has length 5, not 1"
    assert faces.error == ""
    assert text.error == "it read nothing"


def test_a_sleeping_worker_is_woken_by_the_first_question_and_asked_for_its_engines_after_it(
    loopback: Loopback,
) -> None:
    awake: dict[str, dict[str, str]] = {}
    app = fake_service([1.0], ["a"], awake)
    pictures, *_ = run_tests(loopback(app), {"buffalo_l"}, NAMES, b"picture")
    assert pictures.engine == "mlx"
    assert awake == {"engines": ENGINES}


def test_what_is_not_downloaded_is_skipped_unless_the_engine_needs_no_files(
    loopback: Loopback,
) -> None:
    url = loopback(fake_service([1.0], ["a"]))
    missing = {"ViT-B-32__openai", "buffalo_l"}
    pictures, _, faces, _ = run_tests(url, missing, NAMES, b"picture")
    assert pictures.skipped == "not tested: ViT-B-32__openai is not downloaded"
    assert faces.skipped == ""


# -- the bundle ------------------------------------------------------------------------------------

PRIVATE = (
    "/Users/ada/Pictures/2024/secret trip.jpg",
    "ada@example.org",
    "192.168.7.31",
    "fd12:3456:789a::42",
    "nas.private.lan",
    "s3cret-api-key",
    "hf_abcdefghijklmnop",
)


def test_the_bundle_holds_nothing_private(tmp_path: Path, machine_facts: Facts) -> None:
    log = tmp_path / "service.log"
    lines = [f'12:00:00 info gateway saw what="{word}"' for word in PRIVATE]
    log.write_text("\n".join([*lines, "GET http://nas.private.lan:2283/api?key=s3cret-api-key"]))
    settings = Settings(
        immich_url="http://nas.private.lan:2283",
        immich_api_key="s3cret-api-key",  # type: ignore[arg-type]
        models_dir=Path("/Volumes/Ada/models"),
    )
    result = Finding(
        "hub", Outcome.FAIL, "http://nas.private.lan:9 and 192.168.7.31", "chown /home/ada/x"
    )
    bundle = tmp_path / "bundle.zip"
    facts = replace(machine_facts, settings=settings)
    write_bundle(bundle, facts, [result], [log, tmp_path / "absent.log"])
    with zipfile.ZipFile(bundle) as opened:
        texts = {name: opened.read(name).decode() for name in opened.namelist()}
    assert set(texts) == {
        "README.txt",
        "doctor.json",
        "facts.json",
        "settings.json",
        "logs/service.log",
    }
    for name, text in texts.items():
        for word in (*PRIVATE, "nas.private", "Volumes", "/Users", "/home", socket.gethostname()):
            assert word not in text, (name, word)
    assert json.loads(texts["settings.json"])["immich_api_key"] == "set"
    assert "0.1.0" in texts["facts.json"]


@pytest.fixture
def machine_facts() -> Facts:
    return Facts(
        version="0.1.0",
        machine=collect.read_machine(nothing),
        settings=Settings(),
        port=Port(3003, "taken", holder="node, process 1"),
        addresses=("192.168.7.31", "fd12:3456:789a::42"),
    )


@pytest.mark.parametrize(
    "secret",
    [
        "hf_AbCdEfGhIjKl",
        "hunter2",
        "192.168.7.31",
        "10.0.0.93",
        "fd12:3456:789a::42",
        "/Users/anna/Pictures",
        "/volume1/photo",
        "anna@example.org",
        "proxy.corp.example",
        "diskstation.local",
    ],
)
def test_planted_secrets_are_not_shared_and_a_version_is(secret: str) -> None:
    text = (
        "token hf_AbCdEfGhIjKl proxy socks5://me:hunter2@proxy.corp.example:1080 at 192.168.7.31, "
        "10.0.0.93 and fd12:3456:789a::42; /Users/anna/Pictures, /volume1/photo/a.jpg; "
        "anna@example.org diskstation.local opencv-python-headless 5.0.0.93"
    )
    shared = anonymise(text, known_private(Settings()), frozenset({"5.0.0.93"}))
    assert secret in text
    assert secret not in shared
    assert shared.endswith("opencv-python-headless 5.0.0.93")


SECRETS_IN_LOGS = (
    'settings {"api_key": "KEPTjson", "password": "KEPTpass", "token":"KEPTtoken"}',
    "environment HF_TOKEN=KEPTvalue MY_PASSWORD=KEPTword apikey: KEPTkey&x=1",
    "encoded http%3A%2F%2Fjane%3AKEPTlogin%40nas%3A2283%2Fapi",
    "no scheme jane:KEPTcolon@nas:2283",
    "box KEPTname.fritz.box and KEPTname.home.arpa",
    "card 4b:45:50:54:00:01",
    "blanks /Volumes/Fotos KEPT/a.jpg and '/Users/Jane KEPT/b KEPT'",
)


@pytest.mark.parametrize("text", SECRETS_IN_LOGS)
def test_a_secret_is_hidden_however_a_log_spells_it(text: str) -> None:
    shared = anonymise(text, known_private(Settings()))
    assert "KEPT" not in shared
    assert "4b:45" not in shared
    assert shared.split()[0] == text.split()[0]


def test_the_login_in_an_address_of_the_settings_is_hidden_in_every_spelling() -> None:
    settings = Settings(immich_url="http://jan%65:open%53esame@[fd00::7]:2283")
    text = "jane and jan%65 said openSesame or open%53esame at fd00::7"
    shared = anonymise(text, known_private(settings))
    assert shared == "USER and USER said *** or *** at ADDRESS"


def test_a_setting_that_is_set_is_said_to_be_so() -> None:
    text = '"immich_api_key": "set", "hub_token": null'
    assert anonymise(text, known_private(Settings())) == text


def test_a_user_without_a_name_has_none_to_hide(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found: 12345")

    monkeypatch.setattr("getpass.getuser", nobody)
    assert "USER" not in known_private(Settings()).values()


def test_a_start_at_boot_that_may_not_be_looked_at_is_not_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def closed(self: Path, **_: bool) -> bool:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "exists", closed)
    told = collect.read_service(nothing)
    assert told["service"] == "none"
    assert told["service_error"].endswith("Permission denied")


def test_what_helps_is_kept() -> None:
    text = "12:03:44 error engine clip on mlx: http://127.0.0.1:3003 took 1.5 s at 0.0.0.0:3003"
    assert anonymise(text, known_private(Settings())) == text


def test_the_bundle_is_written_by_the_command(tmp_path: Path) -> None:
    bundle = tmp_path / "b.zip"
    report = doctor(tmp_path, "--share", str(bundle), ML_PORT="1")
    with zipfile.ZipFile(bundle) as opened:
        checks = json.loads(opened.read("doctor.json"))
    assert [c["name"] for c in checks] == [c["name"] for c in report["checks"]]


def test_a_shared_report_does_not_say_where_the_service_remembers() -> None:
    settings = Settings(state_dir=Path("/srv/jane/memory"))
    shared = anonymise("cannot write /srv/jane/memory/index.json", known_private(settings))
    assert "jane" not in shared
    assert "STATE/index.json" in shared
