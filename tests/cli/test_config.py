import json
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from immich_ml_metal.cli import app
from immich_ml_metal.errors import ConfigError
from immich_ml_metal.settings import GROUPS, Settings, env_names, grouped
from immich_ml_metal.settings_sources import load_settings, resolve
from immich_ml_metal.settings_text import render

run = CliRunner(env={"ML_CONFIG_FILE": None, "COLUMNS": "160"}).invoke


def test_the_written_file_names_every_setting_its_help_and_its_variables(tmp_path: Path) -> None:
    path = tmp_path / "new" / "config.toml"
    assert run(app, ["config", "init", str(path)]).exit_code == 0
    text = path.read_text()
    for name, field in Settings.model_fields.items():
        assert f"{name} = " in text
        assert str(field.description) in text
        assert all(variable in text for variable in env_names(field))
    assert path.stat().st_mode & 0o077 == 0
    assert load_settings(environ={}, file=path) == load_settings(environ={})


def test_every_default_in_the_file_is_valid_when_uncommented(tmp_path: Path) -> None:
    lines = render(Settings(), ()).splitlines()
    values = [
        line.removeprefix("# ")
        for line in lines
        if line.removeprefix("# ").split(" = ")[0] in Settings.model_fields
        and not line.endswith("# not set")
    ]
    path = tmp_path / "all.toml"
    path.write_text("\n".join(values))
    assert len(values) > 20
    assert load_settings(environ={}, file=path) == load_settings(environ={})


def test_values_in_force_are_carried_over_from_an_immich_env_file(tmp_path: Path) -> None:
    env, path = tmp_path / ".env", tmp_path / "c.toml"
    env.write_text("IMMICH_PORT=4004\nMACHINE_LEARNING_MODEL_TTL=60\nDB_PASSWORD=x\n")
    run(app, ["config", "init", str(path), "--env-file", str(env)])
    settings = load_settings(environ={}, file=path)
    assert (settings.port, settings.model_ttl_s) == (4004, 60)
    assert set(tomllib.loads(path.read_text())) == {"port", "model_ttl_s"}


def test_an_existing_file_is_kept_unless_forced(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text("port = 1\n")
    assert run(app, ["config", "init", str(path)]).exit_code == 2
    assert path.read_text() == "port = 1\n"
    assert run(app, ["config", "init", str(path), "--force"]).exit_code == 0
    assert "# port = 3003" in path.read_text()


def test_show_says_where_each_value_came_from(tmp_path: Path) -> None:
    env, path = tmp_path / ".env", tmp_path / "c.toml"
    env.write_text("IMMICH_PORT=4004\nML_IMMICH_API_KEY=tell-nobody\n")
    path.write_text("model_ttl_s = 7\n")
    out = run(
        app, ["config", "show", "--json", "--config", str(path), "--env-file", str(env)]
    ).stdout
    rows = json.loads(out)
    assert rows["port"] == {"value": 4004, "from": "IMMICH_PORT"}
    assert rows["model_ttl_s"] == {"value": 7.0, "from": str(path)}
    assert rows["log_level"] == {"value": "info", "from": "default"}
    assert rows["immich_api_key"] == {"value": "***", "from": "ML_IMMICH_API_KEY"}
    assert set(rows) == set(Settings.model_fields)


def test_show_prints_a_table_without_the_key(tmp_path: Path) -> None:
    env = tmp_path / ".env"
    env.write_text("ML_IMMICH_API_KEY=tell-nobody\nML_PORT=4005\n")
    out = run(app, ["config", "show", "--env-file", str(env)]).stdout
    assert "tell-nobody" not in out
    assert any(line.split() == ["port", "4005", "ML_PORT"] for line in out.splitlines())


def test_show_fits_a_screen_and_all_shows_every_setting(tmp_path: Path) -> None:
    env = tmp_path / ".env"
    env.write_text("ML_MODEL_TTL=60\nML_IMMICH_URL=http://nas:2283\n")
    short, full = (
        run(app, ["config", "show", "--env-file", str(env), *more]).stdout.splitlines()
        for more in ([], ["--all"])
    )
    shown = {line.split()[0] for line in short if line.startswith("   ")}
    assert len(short) <= 24
    assert {"host", "profile", "model_ttl_s", "immich_url"} <= shown
    assert not {"hold_limit_s", "log_file"} & shown
    assert short[-1].split()[0] == str(len(Settings.model_fields) - len(shown))
    assert [line.split()[0] for line in full if line.startswith("   ")] == list(
        Settings.model_fields
    )


def test_each_setting_is_in_one_group_that_begins_as_the_table_says() -> None:
    groups = grouped()
    assert [name for names in groups.values() for name in names] == list(Settings.model_fields)
    assert {names[0]: title for title, names in groups.items()} == dict(GROUPS)


def test_check_passes_and_mentions_names_without_meaning_here(tmp_path: Path) -> None:
    env = tmp_path / ".env"
    env.write_text("MACHINE_LEARNING_WORKERS=4\nMACHINE_LEARNING_HTTP_KEEPALIVE_TIMEOUT_S=2\n")
    result = run(app, ["config", "check", "--env-file", str(env)])
    assert result.exit_code == 0
    for name in ("MACHINE_LEARNING_WORKERS", "MACHINE_LEARNING_HTTP_KEEPALIVE_TIMEOUT_S"):
        assert f"{name} is set, but it has no meaning here" in result.stdout


@pytest.mark.parametrize(
    ("line", "advice"),
    [
        ("PRELOAD__CLIP=ViT-B-32__openai", "PRELOAD__CLIP__TEXTUAL and __VISUAL instead"),
        (
            "PRELOAD__FACIAL_RECOGNITION=buffalo_l",
            "PRELOAD__FACIAL_RECOGNITION__DETECTION and __RECOGNITION instead",
        ),
        ("PRELOAD__CLIP__TEXTUAL=ViT-B-32__openai", None),
    ],
)
def test_check_mentions_an_old_name_and_the_new_ones(
    tmp_path: Path, line: str, advice: str | None
) -> None:
    env = tmp_path / ".env"
    env.write_text(f"MACHINE_LEARNING_{line}\n")
    result = run(app, ["config", "check", "--env-file", str(env)])
    assert result.exit_code == 0
    assert ("old name" in result.stdout) is (advice is not None)
    assert (advice or "") in result.stdout


def test_check_stops_at_a_wrong_value(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text("port = 70000\n")
    result = run(app, ["config", "check", "--config", str(path)])
    assert isinstance(result.exception, ConfigError)
    assert "port" in str(result.exception)


def test_names_that_are_read_are_not_called_ignored() -> None:
    environ = {"MACHINE_LEARNING_MODEL_TTL": "1", "machine_learning_ann": "true", "HOME": "/"}
    assert resolve(environ=environ).warnings == [
        "MACHINE_LEARNING_ANN is set, but it has no meaning here and is ignored"
    ]


def test_a_secret_is_not_repeated_in_an_error() -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings({"immich_api_key": 12345678})
    assert "12345678" not in str(caught.value)


@given(st.text(st.characters(codec="utf-8"), min_size=1))
def test_any_text_survives_the_file(text: str) -> None:
    settings = Settings(clip_model=text)
    assert tomllib.loads(render(settings, ["clip_model"])) == {"clip_model": text}
