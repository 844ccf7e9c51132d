"""What `service install` writes of the caller's settings, and what the other commands go by."""

import os
import stat
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from immich_ml_metal.cli import app
from immich_ml_metal.errors import ConfigError
from immich_ml_metal.immich.records import DOCUMENT as GUARD
from immich_ml_metal.qualification.record import DOCUMENT as ENGINES
from immich_ml_metal.service.launchd import Launchd
from immich_ml_metal.service.plan import ServiceFailed, make_plan
from immich_ml_metal.service.systemd import Systemd
from immich_ml_metal.service.traces import DOCUMENTS
from immich_ml_metal.settings import Settings
from immich_ml_metal.settings_sources import load_settings, named_file, variables_of_file
from immich_ml_metal.settings_text import merge, render, shown
from immich_ml_metal.system.programs import Completed

linux = pytest.mark.skipif(sys.platform != "linux", reason="drives the systemd manager")

MINE = """\
# my own notes
clip_model = "ViT-B-32__openai"   # the one Immich uses

preload_clip_textual = [
    "ViT-B-32__openai",  # port = 1
]
# port = 3003
log_level = '''info'''
"""


def answers(home: Path, script: str) -> None:
    program = home / "tools" / "systemctl"
    program.write_text(f'#!/bin/sh\necho "$@" >> {home}/asked\n{script}\n')
    program.chmod(0o755)


def run(home: Path, *args: str, **env: str) -> Any:
    path = f"{home / 'tools'}:{os.defpath}"
    return CliRunner(env={"HOME": str(home), "PATH": path, **env}).invoke(app, ["service", *args])


def config_of(home: Path) -> Path:
    return home / ".config/immich-ml-metal/config.toml"


# -- the file's text -------------------------------------------------------------------------------


def test_a_persons_file_keeps_its_comments_and_order() -> None:
    values = {"port": 4711, "clip_model": "RN50__openai", "preload_clip_textual": ("a", "b")}
    assert merge(MINE, {**values, "offline": True}, {"HF_TOKEN": "hf_x"}) == (
        "# my own notes\n"
        'clip_model = "RN50__openai"  # the one Immich uses\n'
        "\n"
        'preload_clip_textual = ["a", "b"]\n'
        "# port = 3003\n"
        "port = 4711\n"
        "log_level = '''info'''\n"
        "offline = true\n"
        "\n"
        "[environment]\n"
        'HF_TOKEN = "hf_x"\n'
    )


def test_the_same_values_again_change_nothing() -> None:
    once = merge(MINE, {"port": 4711}, {"HF_TOKEN": "hf_x"})
    assert merge(once, {"port": 4711}, {"HF_TOKEN": "hf_x"}) == once
    assert merge(MINE, {}, {}) == MINE


def test_a_variable_is_replaced_in_its_table() -> None:
    text = 'port = 1\n[environment]\nHF_TOKEN = "old"\nNO_PROXY = "a"  # the NAS\n'
    assert merge(text, {"offline": True}, {"HF_TOKEN": "new"}) == (
        'port = 1\noffline = true\n[environment]\nHF_TOKEN = "new"\nNO_PROXY = "a"  # the NAS\n'
    )


def test_a_file_that_cannot_be_added_to_is_left_alone() -> None:
    with pytest.raises(ConfigError, match="as a table"):
        merge('environment = {HF_TOKEN = "a"}\n', {}, {"NO_PROXY": "b"})


@given(st.text(st.characters(codec="utf-8")), st.text(st.characters(codec="utf-8"), min_size=1))
def test_any_comment_and_any_value_survive(comment: str, value: str) -> None:
    line = "".join(c for c in comment if c.isprintable())
    text = merge(f'clip_model = "#" # {line}', {"clip_model": value}, {"NO_PROXY": value})
    assert tomllib.loads(text) == {"clip_model": value, "environment": {"NO_PROXY": value}}
    assert line.rstrip() in text


def test_what_is_shown_holds_no_secret() -> None:
    environment = {"HF_TOKEN": "hf_x", "HTTPS_PROXY": "me:secret@proxy:1", "NO_PROXY": "nas"}
    text = merge(render(Settings(), ()), {"immich_api_key": "tell-nobody"}, environment)
    assert shown(text) == (
        "immich_api_key = ***\n[environment]\n"
        'HF_TOKEN = "***"\nHTTPS_PROXY = "http://***@proxy:1"\nNO_PROXY = "nas"'
    )


# -- its table `environment` -----------------------------------------------------------------------


def test_variables_of_the_file_hold_where_the_process_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "c.toml"
    file.write_text('[environment]\nHTTPS_PROXY = "http://file:1"\nHF_TOKEN = "file"\n')
    monkeypatch.setenv("https_proxy", "http://caller:1")
    monkeypatch.delenv("HTTPS_PROXY", raising=False)
    with named_file(file), variables_of_file():
        assert os.environ["HF_TOKEN"] == "file"
        assert "HTTPS_PROXY" not in os.environ
    assert "HF_TOKEN" not in os.environ


def test_every_command_has_the_variables_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('[environment]\nHTTPS_PROXY = "ftp://x"\n')
    result = CliRunner().invoke(app, ["config", "check", "--config", str(file)])
    assert "HTTPS_PROXY is not the address of a proxy" in result.stdout


@pytest.mark.parametrize("line", ["[environment]\nHTTP_PROXI = 'x'", "environment = 3"])
def test_a_variable_that_is_not_known_is_refused(tmp_path: Path, line: str) -> None:
    file = tmp_path / "c.toml"
    file.write_text(line)
    with pytest.raises(ConfigError, match="environment"):
        load_settings(environ={}, file=file)


# -- installing ------------------------------------------------------------------------------------


@linux
def test_the_callers_network_is_written_for_the_owner_alone(home: Path) -> None:
    (home / "immich.env").write_text("HF_TOKEN=hf_secret\nIMMICH_PORT=4711\n")
    env = {"https_proxy": "http://me:word@proxy:3128", "NO_PROXY": "nas"}
    result = run(home, "install", "--env-file", str(home / "immich.env"), **env)
    assert result.exit_code == 0, result.output
    assert 'HTTPS_PROXY = "http://***@proxy:3128"' in result.stdout
    assert "word" not in result.output
    assert "hf_secret" not in result.output
    file = config_of(home)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    written = tomllib.loads(file.read_text())
    known = {"HTTPS_PROXY": env["https_proxy"], "NO_PROXY": "nas", "HF_TOKEN": "hf_secret"}
    assert written == {"port": 4711, "environment": known}
    unit = (home / ".config/systemd/user/immich-ml-metal.service").read_text()
    assert "word" not in unit


@linux
def test_what_is_set_now_goes_into_the_file_that_is_named(home: Path) -> None:
    file = home / "mine.toml"
    file.write_text(MINE)
    result = run(home, "install", "--config", str(file), ML_PORT="4711")
    assert result.exit_code == 0, result.output
    assert file.read_text() == MINE.replace("# port = 3003\n", "# port = 3003\nport = 4711\n")
    assert not config_of(home).exists()


@linux
def test_a_setting_that_the_service_would_refuse_is_refused_at_once(home: Path) -> None:
    result = run(home, "install", ML_CLIP_MODEL="ViT-B-32_openai")
    assert isinstance(result.exception, ConfigError)
    assert "ViT-B-32__openai" in str(result.exception)
    assert not (home / ".config").exists()


@linux
def test_a_failed_install_leaves_what_was_there_and_nothing_else(home: Path) -> None:
    answers(home, "exit 1")
    assert isinstance(run(home, "install", ML_PORT="1").exception, ServiceFailed)
    assert not (home / ".config").exists()
    answers(home, "")
    run(home, "install", ML_PORT="4711")
    unit = home / ".config/systemd/user/immich-ml-metal.service"
    before = unit.read_text(), config_of(home).read_text()
    answers(home, f'test "$2" != restart -o -f {home}/again || {{ touch {home}/again; exit 1; }}')
    (home / "asked").unlink()
    result = run(home, "install", ML_PORT="4712")
    assert isinstance(result.exception, ServiceFailed)
    assert (unit.read_text(), config_of(home).read_text()) == before
    restarts = [line for line in (home / "asked").read_text().splitlines() if "restart" in line]
    assert len(restarts) == 2  # the second one brings the former service back


# -- going by what is installed --------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["systemd", "launchd"])
def test_what_a_definition_runs_is_read_back(tmp_path: Path, kind: str) -> None:
    def ok(*args: str) -> Completed:
        return Completed(113 if args[1] == "print" else 0)

    manager = Systemd(ok, tmp_path) if kind == "systemd" else Launchd(ok, tmp_path, 501)
    assert manager.command() == ()
    words = ('/a b/"x"', r"back\slash", "per%cent", "dol$lar", "$$%%", "plain")
    manager.install(make_plan(Settings(), words, tmp_path / "logs"))
    assert manager.command() == (*words, "serve")
    manager.definition.write_text("nonsense")
    assert manager.command() == ()


@linux
def test_logs_are_those_of_the_file_that_the_unit_names(home: Path) -> None:
    file = home / "mine.toml"
    file.write_text(f'log_file = "{home}/elsewhere/x.log"\n')
    run(home, "install", "--config", str(file))
    (home / "elsewhere" / "x.log").write_text("hello\n")
    assert "hello" in run(home, "logs").stdout
    assert "hello" in run(home, "logs", ML_LOG_FILE="/nowhere.log").stdout
    other = home / "other.toml"
    other.write_text("port = 1\n")
    assert run(home, "logs", "--config", str(other)).exit_code == 1


# -- leaving ---------------------------------------------------------------------------------------


def test_every_document_of_the_state_folder_is_known() -> None:
    assert {GUARD, ENGINES} < set(DOCUMENTS)


@linux
def test_a_purge_removes_what_is_ours_and_names_what_stays(home: Path) -> None:
    state, models = home / "state", home / "models"
    models.mkdir()
    env = {"ML_STATE_DIR": str(state), "ML_MODELS_DIR": str(models)}
    assert run(home, "install", **env).exit_code == 0
    state.mkdir()
    logs = home / ".local/state/immich-ml-metal"
    ours = [state / "engines.json", state / ".engines.lock", state / "index.json"]
    ours += [logs / "service.log", logs / "service.log.1", logs / "service.worker.log"]
    foreign = state / "package.json"
    for path in [*ours, foreign]:
        path.touch()
    result = run(home, "uninstall", "--purge")
    assert result.exit_code == 0, result.output
    assert [path for path in [*ours, config_of(home), logs] if path.exists()] == []
    assert foreign.exists()
    assert models.is_dir()
    assert f"rm -r {models}" in result.stdout
    assert f"Removed {config_of(home)}" in result.stdout


@linux
def test_a_purge_leaves_a_file_that_somebody_keeps_elsewhere(home: Path) -> None:
    file = home / "mine.toml"
    file.write_text(MINE)
    run(home, "install", "--config", str(file))
    assert f"Left: your settings file: rm {file}" in run(home, "uninstall", "--purge").stdout
    assert file.exists()


@linux
def test_an_uninstall_keeps_settings_and_logs(home: Path) -> None:
    run(home, "install", ML_PORT="4711")
    assert run(home, "uninstall").stdout.count("\n") == 1
    assert config_of(home).exists()
