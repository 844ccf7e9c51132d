"""By hand: releasing what we paused, and what `service` says and does about it."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from doubles.immich import KEY, ImmichDouble
from typer.testing import CliRunner

from immich_ml_metal.cli import app
from immich_ml_metal.immich.records import DOCUMENT, VERSION, Pause, Records, claim
from immich_ml_metal.state import StateFolder, StateUnusable

Loopback = Callable[[Any], str]
PAUSE = Pause("the service is stopped", "2026-11-25T10:00:00+00:00")


@pytest.fixture
def immich() -> ImmichDouble:
    """Smart search is paused by us, text by somebody else."""
    double = ImmichDouble()
    double.queues["smartSearch"].is_paused = double.queues["ocr"].is_paused = True
    return double


@pytest.fixture
def folder(tmp_path: Path) -> StateFolder:
    state = StateFolder(tmp_path / "state")
    state.write(DOCUMENT, VERSION, Records(paused={"clip": PAUSE}).document())
    return state


def run(url: str, folder: StateFolder, *args: str) -> Any:
    env = {"ML_IMMICH_URL": url, "ML_IMMICH_API_KEY": KEY, "ML_STATE_DIR": str(folder.path)}
    return CliRunner(env=env).invoke(app, list(args))


def test_release_resumes_what_we_paused_and_nothing_else(
    loopback: Loopback, immich: ImmichDouble, folder: StateFolder
) -> None:
    result = run(loopback(immich.app), folder, "immich", "release")
    assert (result.exit_code, immich.paused) == (0, {"ocr"})
    assert "smartSearch goes on." in result.stdout
    assert "ocr is paused, but not by us" in result.stdout
    assert Records.load(folder).paused == {}


def test_release_all_resumes_whoever_paused(
    loopback: Loopback, immich: ImmichDouble, folder: StateFolder
) -> None:
    run(loopback(immich.app), folder, "immich", "release", "--all")
    assert immich.paused == set()


def test_release_leaves_the_records_to_a_service_that_runs(
    loopback: Loopback, immich: ImmichDouble, folder: StateFolder
) -> None:
    with claim(folder):
        run(loopback(immich.app), folder, "immich", "release")
    assert immich.paused == {"ocr"}
    assert Records.load(folder).paused == {"clip": PAUSE}  # the service finds it running


def test_damaged_records_are_said_and_all_still_works(
    loopback: Loopback, immich: ImmichDouble, folder: StateFolder
) -> None:
    (folder.path / f"{DOCUMENT}.json").write_text('{"version": 1, "paused": {"clip": 7}}')
    url = loopback(immich.app)
    result = run(url, folder, "immich", "release")
    assert isinstance(result.exception, StateUnusable)
    assert "is damaged" in str(result.exception)
    run(url, folder, "immich", "release", "--all")
    assert immich.paused == set()


def test_status_says_who_paused_and_why(
    loopback: Loopback, immich: ImmichDouble, folder: StateFolder
) -> None:
    result = run(loopback(immich.app), folder, "immich", "status")
    words = " ".join(result.stdout.split())
    assert "paused by us; the service is stopped, since 2026-11-25" in words
    assert "paused by somebody else" in words


# -- `service` -------------------------------------------------------------------------------------


@pytest.fixture
def systemctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with an installed unit, and a `systemctl` that succeeds; its folder of programs."""
    if sys.platform != "linux":
        pytest.skip("the unit of systemd is Linux's")
    unit = tmp_path / "home" / ".config" / "systemd" / "user" / "immich-ml-metal.service"
    unit.parent.mkdir(parents=True)
    unit.write_text("[Service]\n")
    program = tmp_path / "bin" / "systemctl"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\nexit 0\n")
    program.chmod(0o755)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    return unit


@pytest.mark.usefixtures("systemctl")
def test_a_stop_says_that_queues_stay_paused_and_how_to_release_them(folder: StateFolder) -> None:
    result = run("http://127.0.0.1:1", folder, "service", "stop")
    words = " ".join(result.stdout.split())
    assert "Immich's queues smartSearch stay paused" in words
    assert "immich-ml-metal immich release" in words


def test_an_uninstall_releases_the_queues(
    loopback: Loopback, immich: ImmichDouble, folder: StateFolder, systemctl: Path
) -> None:
    result = run(loopback(immich.app), folder, "service", "uninstall")
    assert (result.exit_code, immich.paused) == (0, {"ocr"})
    assert not systemctl.exists()


@pytest.mark.usefixtures("systemctl")
def test_an_uninstall_that_cannot_reach_immich_says_what_is_left_to_do(
    folder: StateFolder,
) -> None:
    result = run("http://127.0.0.1:1", folder, "service", "uninstall")
    assert result.exit_code == 1
    assert "immich-ml-metal immich release" in result.output
    assert Records.load(folder).paused == {"clip": PAUSE}


@pytest.mark.usefixtures("systemctl")
def test_an_uninstall_that_cannot_read_what_we_paused_says_how_to_go_on(
    loopback: Loopback, immich: ImmichDouble, folder: StateFolder
) -> None:
    (folder.path / f"{DOCUMENT}.json").write_text("{")
    result = run(loopback(immich.app), folder, "service", "uninstall")
    assert result.exit_code == 1
    assert "is damaged" in result.output
    assert "immich-ml-metal immich release" in result.output
