import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from doubles.engines import VISUAL as VISUAL_KEY
from doubles.live import VISUAL, face_entries, predict, serve
from doubles.tiny_models import CLIP, FACES, OCR, draw_faces
from hypothesis import given
from hypothesis import strategies as st

from immich_ml_metal.catalog import preload_setting
from immich_ml_metal.client.calls import configured_names, immich_calls
from immich_ml_metal.errors import ConfigError
from immich_ml_metal.settings import MIB, Settings, env_names
from immich_ml_metal.settings_sources import load_settings, resolve
from immich_ml_metal.types import SLOTS, ModelKey, Task
from immich_ml_metal.worker.compose import build_app
from immich_ml_metal.worker.preload import preload_keys

SOURCE = Path(__file__).parents[1] / "src" / "immich_ml_metal"
PHOTO = draw_faces((160, 160))


# -- order of the sources ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_", "environ", "toml", "port", "origin"),
    [
        ({}, {}, "", 3003, "default"),
        ({}, {}, "port = 4", 4, "TOML"),
        ({}, {"IMMICH_PORT": "3"}, "port = 4", 3, "IMMICH_PORT"),
        ({}, {"ML_PORT": "2", "IMMICH_PORT": "3"}, "port = 4", 2, "ML_PORT"),
        ({"port": 1}, {"ML_PORT": "2", "IMMICH_PORT": "3"}, "port = 4", 1, "command line"),
        ({"port": None}, {"ML_PORT": "2"}, "", 2, "ML_PORT"),
        ({}, {"ML_PORT": "", "IMMICH_PORT": "3"}, "", 3, "IMMICH_PORT"),
        ({}, {"ml_port": "2"}, "", 2, "ML_PORT"),
    ],
)
def test_the_command_line_wins_then_our_names_the_official_ones_and_the_file(
    tmp_path: Path,
    given_: dict[str, Any],
    environ: dict[str, str],
    toml: str,
    port: int,
    origin: str,
) -> None:
    file = tmp_path / "c.toml"
    file.write_text(toml)
    settings, sources, _ = resolve(given_, environ=environ, file=file)
    assert settings.port == port
    assert sources["port"] == (str(file) if origin == "TOML" else origin)


def test_the_environment_wins_over_an_env_file(tmp_path: Path) -> None:
    env = tmp_path / ".env"
    env.write_text("ML_PORT=1\nIMMICH_HOST=h\nDB_PASSWORD=x\n")
    settings = load_settings(environ={"ML_PORT": "2"}, env_file=env)
    assert (settings.port, settings.host) == (2, "h")


def test_the_file_may_be_named_by_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text("port = 9")
    assert load_settings(environ={"ML_CONFIG_FILE": str(file)}).port == 9


@pytest.mark.parametrize("name", sorted(Settings.model_fields))
def test_every_setting_can_be_given_under_each_of_its_names(name: str) -> None:
    field = Settings.model_fields[name]
    own, *official = env_names(field)
    assert own.startswith("ML_")
    assert field.description
    for variable in (own, *official):
        _, sources, _ = resolve(environ={variable: example(name)})
        assert sources[name] == variable


def example(name: str) -> str:
    """A value other than the default, as it is written in the environment."""
    words = {
        "log_level": "debug",
        "log_format": "json",
        "immich_compat": "3.2",
        "hub_endpoint": "http://mirror",
        "modelscope_endpoint": "http://mirror",
        "immich_url": "http://nas:2283",
        "graph_rewriting": "rows, length",
    }
    default = Settings.model_fields[name].default
    if name in words:
        return words[name]
    if isinstance(default, bool):
        return str(not default).lower()
    if isinstance(default, int | float):
        return str(round(default / 2) or 1) if default != 0.7 else "0.3"
    choices = getattr(Settings.model_fields[name].annotation, "__args__", ())
    others = [choice for choice in choices if isinstance(choice, str) and choice != default]
    return others[0] if others else "other"


# -- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"ML_PORT": "abc"}, "ML_PORT = 'abc': .*setting port"),
        ({"IMMICH_PORT": "99999"}, "IMMICH_PORT = '99999': .*65535"),
        ({"ML_FACE_MIN_SCORE": "1.5"}, "ML_FACE_MIN_SCORE = '1.5'"),
        ({"ML_REQUEST_TIMEOUT": "0"}, "ML_REQUEST_TIMEOUT = '0'"),
        ({"ML_REQUEST_TIMEOUT": "nan"}, "ML_REQUEST_TIMEOUT = 'nan'"),
        ({"ML_MODEL_TTL": "-1"}, "ML_MODEL_TTL = '-1'"),
        ({"ML_REQUEST_THREADS": "-1"}, "ML_REQUEST_THREADS = '-1'"),
        ({"ML_MAX_IMAGE_SIZE": "ten"}, "ML_MAX_IMAGE_SIZE = 'ten'"),
        ({"ML_MAX_IMAGE_SIZE": "0"}, "ML_MAX_IMAGE_SIZE = '?0"),
        ({"ML_IMMICH_COMPAT": "2.7"}, "ML_IMMICH_COMPAT = '2.7'"),
        ({"ML_LOG_LEVEL": "loud"}, "ML_LOG_LEVEL = 'loud'"),
        ({"ML_MODEL_REVISION": "../x"}, "ML_MODEL_REVISION = '../x'"),
        ({"ML_HUB_ENDPOINT": "mirror"}, "ML_HUB_ENDPOINT = 'mirror'"),
        ({"ML_OFFLINE": "perhaps"}, "ML_OFFLINE = 'perhaps'"),
        ({"ML_PROT": "1"}, "unknown setting ML_PROT; did you mean ML_PORT"),
        ({"ML_MODEL_DIR": "/m"}, "unknown setting ML_MODEL_DIR; did you mean ML_MODELS_DIR"),
        ({"ML_CONFIG_FILE": "/nowhere.toml"}, "cannot read the settings file /nowhere.toml"),
    ],
)
def test_a_wrong_name_or_value_is_told_with_both(environ: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_settings(environ=environ)


@pytest.mark.parametrize(
    ("environ", "name", "value", "warning"),
    [
        ({"MACHINE_LEARNING_WORKER_TIMEOUT": "0"}, "request_timeout_s", 86400, "no limit"),
        ({"MACHINE_LEARNING_WORKER_TIMEOUT": "-1"}, "request_timeout_s", 86400, "no limit"),
        ({"MACHINE_LEARNING_WORKER_TIMEOUT": "60"}, "request_timeout_s", 60, ""),
        ({"MACHINE_LEARNING_MODEL_TTL": "-1"}, "model_ttl_s", 0, "models are kept"),
        ({"MACHINE_LEARNING_REQUEST_THREADS": "-2"}, "request_threads", 0, "one per core"),
        ({"MACHINE_LEARNING_MODEL_INTRA_OP_THREADS": "-1"}, "intra_op_threads", 0, "per core"),
        ({"IMMICH_LOG_LEVEL": "fatal"}, "log_level", "info", "means info"),
        ({"IMMICH_LOG_LEVEL": "Verbose"}, "log_level", "debug", ""),
        ({"HF_HUB_OFFLINE": "2"}, "offline", False, "means off"),
        ({"HF_HUB_OFFLINE": "y"}, "offline", False, "means off"),
        ({"HF_HUB_OFFLINE": "on"}, "offline", True, ""),
        ({"HF_HUB_OFFLINE": "0"}, "offline", False, ""),
    ],
)
def test_a_value_that_the_official_service_takes_is_read_as_there_and_said(
    environ: dict[str, str], name: str, value: object, warning: str
) -> None:
    settings, _, warnings = resolve(environ=environ)
    assert getattr(settings, name) == value
    assert bool(warnings) is bool(warning)
    assert warning in "".join(warnings)


@pytest.mark.parametrize(
    ("text", "value"), [('"300"', 300), ("'300'", 300), (" 300 ", 300), ("\" '300' \"", 300)]
)
def test_quotes_and_blanks_around_a_value_are_stripped(text: str, value: float) -> None:
    assert load_settings(environ={"MACHINE_LEARNING_MODEL_TTL": text}).model_ttl_s == value
    assert load_settings(environ={"ML_MODEL_TTL": text}).model_ttl_s == value


def test_old_names_of_the_address_are_honoured_with_a_warning() -> None:
    old = {"MACHINE_LEARNING_HOST": "127.0.0.1", "MACHINE_LEARNING_PORT": "3117"}
    settings, _, warnings = resolve(environ=old)
    assert (settings.host, settings.port) == ("127.0.0.1", 3117)
    assert [w for w in warnings if "IMMICH_HOST" in w]
    assert [w for w in warnings if "IMMICH_PORT" in w]
    assert load_settings(environ={**old, "IMMICH_PORT": "3118"}).port == 3118


def test_settings_of_another_project_are_ignored_with_one_warning() -> None:
    others = {"ML_CLIP_CONCURRENCY": "2", "ML_LOG_REQUESTS": "true", "ML_DEBUG_MODE": "false"}
    (warning,) = resolve(environ=others).warnings
    assert all(name in warning for name in others)
    assert "ignored" in warning


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"A=1\n# Z\xfcrich\n", "not UTF-8 \\(line 2, byte 8\\)"),
        ("\ufeffML_PORT=70000\n".encode(), "ML_PORT = '70000'"),
        (None, "some.env: No such file"),
    ],
)
def test_an_env_file_that_cannot_be_read_is_named(
    tmp_path: Path, content: bytes | None, words: str
) -> None:
    file = tmp_path / "some.env"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=words):
        load_settings(environ={}, env_file=file)


def test_an_env_file_that_is_a_folder_or_closed_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(str(tmp_path))):
        load_settings(environ={}, env_file=tmp_path)


def test_a_password_in_an_address_is_not_repeated_in_an_error() -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings(environ={"ML_IMMICH_URL": "ftp://me:hunter2@nas:2283"})
    assert "hunter2" not in str(caught.value)
    assert "nas" in str(caught.value)


def test_the_file_that_config_init_writes_is_found_by_all(
    home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / ".config" / "immich-ml-metal" / "config.toml"
    file.parent.mkdir(parents=True)
    file.write_text("port = 4711")
    assert load_settings(environ={}).port == 4711
    other = tmp_path / "other.toml"
    other.write_text("port = 4712")
    assert load_settings(environ={"ML_CONFIG_FILE": str(other)}).port == 4712


def test_every_wrong_value_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings(environ={"ML_PORT": "abc", "ML_FACE_MIN_SCORE": "2"})
    assert "ML_PORT" in str(caught.value)
    assert "ML_FACE_MIN_SCORE" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"prot = 1", "unknown setting 'prot' in .*did you mean port"),
        (b"port = ", "is not TOML"),
        (b"\xff", "is not UTF-8 \\(line 1, byte 1\\)"),
        (b"port = 'x'", "port"),
    ],
)
def test_a_wrong_file_is_told_by_name(tmp_path: Path, content: bytes, words: str) -> None:
    file = tmp_path / "c.toml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=words):
        load_settings(environ={}, file=file)


def test_an_env_file_that_is_not_there_is_told() -> None:
    with pytest.raises(ConfigError, match=r"cannot read the env file /nowhere/\.env: No such file"):
        load_settings(environ={}, env_file=Path("/nowhere/.env"))


def test_names_of_other_programs_are_left_alone() -> None:
    environ = {"MLFLOW_URI": "x", "MACHINE_LEARNING_WORKERS": "4", "HOME": "/"}
    assert load_settings(environ=environ) == Settings()


# -- values ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1000", 1000),
        ("64MB", 64 * MIB),
        ("64 MiB", 64 * MIB),
        ("1.5g", int(1.5 * 2**30)),
        ("10k", 10240),
        ("7B", 7),
    ],
)
def test_sizes_are_bytes_or_have_a_unit(text: str, size: int) -> None:
    environ = {"ML_MAX_IMAGE_SIZE": text, "ML_MEMORY_LIMIT": text}
    settings = load_settings(environ=environ)
    assert settings.max_image_size_bytes == settings.memory_limit_bytes == size


@given(st.integers(1, 2**40))
def test_plain_bytes_stay_what_they_are(size: int) -> None:
    assert load_settings(environ={"ML_MAX_IMAGE_SIZE": str(size)}).max_image_size_bytes == size


@pytest.mark.parametrize(
    ("word", "level"),
    [("LOG", "info"), ("verbose", "debug"), ("warn", "warning"), ("CRITICAL", "error")],
)
def test_the_official_words_for_log_levels_are_understood(word: str, level: str) -> None:
    assert load_settings(environ={"IMMICH_LOG_LEVEL": word}).log_level == level


def test_settings_never_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Settings().port = 1
    with pytest.raises(ValueError, match="extra"):
        Settings(prot=1)  # type: ignore[call-arg]


def test_the_defaults_of_the_first_project_are_kept() -> None:
    s = Settings()
    assert (s.host, s.port, s.face_min_score) == ("0.0.0.0", 3003, 0.7)
    assert (s.clip_model, s.face_model) == ("ViT-B-32__openai", "buffalo_l")


# -- what they change --------------------------------------------------------------------------


def test_every_half_can_be_preloaded() -> None:
    for slot in SLOTS:
        name = {Task.CLIP: CLIP, Task.FACES: FACES, Task.OCR: OCR}[slot[0]]
        given: dict[str, Any] = {preload_setting(slot): (name,)}
        assert preload_keys(Settings(**given)) == (ModelKey(*slot, name),)


@pytest.mark.parametrize(
    "name", sorted(set(Settings.model_fields) - {preload_setting(slot) for slot in SLOTS})
)
def test_every_setting_is_read_somewhere(name: str) -> None:
    used = re.compile(rf"\.{name}\b|\"{name}\"")  # an attribute, or a name in a table
    readers = [
        path
        for path in SOURCE.rglob("*.py")
        if (used.search(path.read_text()) and path.name != "settings_sources.py")
        or f"self.{name} " in path.read_text()  # a property of the settings themselves
    ]
    assert readers, f"nothing reads {name}"


@pytest.mark.parametrize(
    ("values", "entries", "status", "words"),
    [
        ({"max_image_size_bytes": len(PHOTO) - 1}, VISUAL, 413, f"limit {len(PHOTO) - 1}"),
        ({"max_image_size_bytes": len(PHOTO)}, VISUAL, 200, ""),
        ({"model_revision": "v9"}, VISUAL, 503, f"{CLIP}/v9"),
        (
            {"model_organization": "mine"},
            {"clip": {"visual": {"modelName": "RN50__openai"}}},
            503,
            "mine/RN50__openai",
        ),
        (
            {"offline": True},
            {"clip": {"visual": {"modelName": "RN50__openai"}}},
            503,
            "switched off",
        ),
    ],
)
def test_limits_and_places_of_models_reach_the_request(
    models: Path, values: dict[str, Any], entries: dict[str, Any], status: int, words: str
) -> None:
    given: dict[str, Any] = {"models_dir": models, "offline": True} | values
    settings = Settings(**given)
    with serve(build_app(settings)) as url:
        answer = predict(url, entries, image=PHOTO)
    assert answer.status_code == status, answer.text
    assert words in answer.text


def test_a_request_without_a_score_gets_the_one_of_the_settings(models: Path) -> None:
    entries = face_entries()
    del entries["facial-recognition"]["detection"]["options"]
    photo = draw_faces((160, 160), (400, 240))  # they score 1.00 and 0.96
    counts = []
    for score in (0.7, 0.98):
        settings = Settings(models_dir=models, offline=True, face_min_score=score)
        with serve(build_app(settings)) as url:
            body = predict(url, entries, image=photo).json()
            counts.append(len(body["facial-recognition"]))
            loud = predict(url, face_entries(0.7), image=photo).json()
            assert len(loud["facial-recognition"]) == 2
    assert counts == [2, 1]


def test_a_decoded_picture_is_kept_for_its_next_task(models: Path) -> None:
    with serve(build_app(Settings(models_dir=models, offline=True))) as url:
        predict(url, VISUAL, image=PHOTO)
        assert httpx.get(f"{url}/health").json()["picture_cache_bytes"] > 0


def test_the_models_of_demo_and_bench_are_settings() -> None:
    calls = immich_calls(
        configured_names(Settings(clip_model=CLIP, face_model=FACES, ocr_model=OCR))
    )
    named = {key.name for call in calls.values() for key in call.keys}
    assert named == {CLIP, FACES, OCR}
    assert VISUAL_KEY in calls["clip image"].keys
