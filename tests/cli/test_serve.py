"""The real `immich-ml-metal serve` process."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from doubles.live import ALL, TEXTUAL, VISUAL, predict
from doubles.tiny_models import draw_faces
from typer.testing import CliRunner

from immich_ml_metal.cli import app
from immich_ml_metal.cli.output import Exit
from immich_ml_metal.client.own_service import OwnService, ServiceDidNotStart, running_service
from immich_ml_metal.errors import ConfigError

PHOTO = draw_faces((160, 160))


@pytest.fixture(scope="module")
def child(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OwnService]:
    folder = tmp_path_factory.mktemp("settings")
    (folder / "c.toml").write_text(f"models_dir = {str(models)!r}\nmodel_ttl_s = 0\n")
    (folder / ".env").write_text(f"ML_MAX_IMAGE_SIZE={len(PHOTO)}\nDB_PASSWORD=x\n")
    options = {"--config": str(folder / "c.toml"), "--env-file": str(folder / ".env")}
    with running_service(options | {"--log-level": "warning"}) as child:
        yield child
    assert not psutil.pid_exists(child.pid), "it did not stop when asked to"


def test_it_answers_all_tasks(child: OwnService) -> None:
    body = predict(child.url, ALL, image=PHOTO).json()
    assert set(body) == {"clip", "facial-recognition", "ocr", "imageWidth", "imageHeight"}
    assert len(body["facial-recognition"]) == 1
    answer = predict(child.url, TEXTUAL, text="dog")
    assert answer.status_code == 200
    assert "infer;dur=" in answer.headers["server-timing"]  # of the worker, told by the gateway


def test_it_answers_ping_and_health(child: OwnService) -> None:
    assert httpx.get(f"{child.url}/ping").text == "pong"
    assert httpx.get(f"{child.url}/health").is_success


def test_settings_come_from_a_file_and_an_immich_env_file(child: OwnService) -> None:
    answer = predict(child.url, VISUAL, image=PHOTO + b"x")
    assert answer.status_code == 413
    assert f"limit {len(PHOTO)}" in answer.text


def test_it_listens_only_where_it_was_told(child: OwnService) -> None:
    listening = [
        c for c in psutil.Process(child.pid).net_connections("tcp") if c.status == "LISTEN"
    ]
    assert {(c.laddr.ip, c.laddr.port) for c in listening} == {
        ("127.0.0.1", int(child.url.rpartition(":")[2]))
    }


def test_its_memory_is_counted(child: OwnService) -> None:
    assert 20 * 2**20 < child.resident_bytes() < 4 * 2**30


@pytest.fixture(scope="module")
def bare(
    models: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[OwnService, Path]]:
    """`serve --no-gateway` with an old and an ignored name in its `.env`, and its log file."""
    folder = tmp_path_factory.mktemp("bare")
    log = folder / "log"
    names = ("PRELOAD__CLIP=ViT-B-32__openai", "HTTP_KEEPALIVE_TIMEOUT_S=2")
    (folder / ".env").write_text("".join(f"MACHINE_LEARNING_{name}\n" for name in names))
    (folder / "c.toml").write_text(f"models_dir = {str(models)!r}\nlog_file = {str(log)!r}\n")
    options = {"--config": str(folder / "c.toml"), "--env-file": str(folder / ".env")}
    with running_service(options | {"--no-gateway": ""}) as child:
        yield child, log
    assert not psutil.pid_exists(child.pid), "it did not stop when asked to"


def test_without_a_gateway_the_engine_answers_alone(bare: tuple[OwnService, Path]) -> None:
    child, _ = bare
    assert predict(child.url, VISUAL, image=PHOTO).is_success
    assert psutil.Process(child.pid).children(recursive=True) == []
    assert "gateway" not in httpx.get(f"{child.url}/health").json()
    metrics = httpx.get(f"{child.url}/metrics").text
    assert "immich_ml_requests_total" in metrics
    assert "process=" not in metrics


def test_with_a_gateway_there_are_two_processes(child: OwnService) -> None:
    assert len(psutil.Process(child.pid).children()) == 1
    assert httpx.get(f"{child.url}/health").json()["gateway"]["pid"] == child.pid


def test_an_old_preload_name_works_and_doubtful_names_are_warned_of(
    bare: tuple[OwnService, Path],
) -> None:
    child, log = bare
    predict(child.url, TEXTUAL, text="dog")  # waits for what is being loaded
    health = httpx.get(f"{child.url}/health").json()
    halves = {model["part"] for model in health["models"]} | {*health["loading"]}
    assert len(halves) == 2
    text = "".join(path.read_text() for path in log.parent.glob("log*"))
    assert text.count("MACHINE_LEARNING_PRELOAD__CLIP is an old name") == 1
    ignored = "MACHINE_LEARNING_HTTP_KEEPALIVE_TIMEOUT_S is set, but it has no meaning here"
    assert text.count(ignored) == 1


def test_a_service_that_cannot_start_is_reported_with_its_last_words(tmp_path: Path) -> None:
    options = {"--config": str(tmp_path / "none.toml")}
    with pytest.raises(ServiceDidNotStart, match=r"none\.toml") as caught:  # noqa: SIM117
        with running_service(options):
            pass
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "env", "words"),
    [
        (["--port", "70000"], {}, "command line = 70000"),
        ([], {"ML_PORT": "abc"}, "ML_PORT = 'abc'"),
        ([], {"ML_PROT": "3003"}, "unknown setting ML_PROT; did you mean ML_PORT?"),
        (["--env-file", "/nowhere/.env"], {}, "/nowhere/.env: No such file"),
        (["--config", "/nowhere.toml"], {}, "/nowhere.toml"),
        (["--log-level", "loud"], {}, "'loud'"),
    ],
)
def test_a_wrong_setting_stops_the_start_with_its_name(
    arguments: list[str], env: dict[str, str], words: str
) -> None:
    result = CliRunner(env=env).invoke(app, ["serve", *arguments])
    assert isinstance(result.exception, ConfigError)
    assert words in str(result.exception)


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("clip_model = 'ViT-B-32_openai'", "clip_model: unknown model 'ViT-B-32_openai'; near"),
        ("face_model = 'PP-OCRv6_small'", "face_model: 'PP-OCRv6_small' is a text model"),
    ],
)
def test_a_setting_that_names_no_model_of_its_kind_stops_the_start(
    tmp_path: Path, file: str, words: str
) -> None:
    (tmp_path / "c.toml").write_text(f"port = 0\nhost = '127.0.0.1'\n{file}\n")
    command = [sys.executable, "-m", "immich_ml_metal", "serve"]
    ended = subprocess.run(
        [*command, "--config", str(tmp_path / "c.toml")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == Exit.USAGE, ended.stderr
    assert words in ended.stderr
    assert "Traceback" not in ended.stderr
