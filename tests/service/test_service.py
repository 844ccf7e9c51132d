"""Service definitions and managers, with the managers' own programs faked."""

import getpass
import json
import os
import plistlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from doubles.timing import Clock
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from typer.testing import CliRunner

from immich_ml_metal import __version__
from immich_ml_metal.cli import app
from immich_ml_metal.cli.ending import exit_code
from immich_ml_metal.errors import ConfigError
from immich_ml_metal.service.choose import choose_manager
from immich_ml_metal.service.launchd import Launchd
from immich_ml_metal.service.log_files import log_folder, new_text, tail
from immich_ml_metal.service.plan import (
    JOB,
    ServiceFailed,
    ServicePlan,
    find_program,
    make_plan,
    stable_path,
)
from immich_ml_metal.service.systemd import Systemd
from immich_ml_metal.settings import Settings
from immich_ml_metal.settings_sources import load_settings
from immich_ml_metal.system.listen import CannotListen
from immich_ml_metal.system.power import KeepAwake
from immich_ml_metal.system.programs import Completed, run_program

PRINTED = """gui/501/immich-ml-metal.service = {
\tactive count = 1
\tstate = running
\tpid = 4242
\tlast exit code = 6: SIGABRT
}
"""


class FakeRunner:
    """Answers by the first words of a call; everything else succeeds silently."""

    def __init__(self, **answers: Completed) -> None:
        self.answers = answers
        self.calls: list[tuple[str, ...]] = []

    def __call__(self, *args: str) -> Completed:
        self.calls.append(args)
        return self.answers.get(args[1], Completed(0))

    def verbs(self) -> list[str]:
        return [call[1] for call in self.calls]


@pytest.fixture
def plan(tmp_path: Path) -> ServicePlan:
    program = tmp_path / "bin dir" / "immich-ml-metal"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    return make_plan(Settings(), (str(program),), tmp_path / "logs")


# -- the plan --------------------------------------------------------------------------------------


def test_a_link_is_kept_so_that_an_upgrade_can_move_its_target(tmp_path: Path) -> None:
    versioned = tmp_path / "tools" / "0.1.0" / "immich-ml-metal"
    versioned.parent.mkdir(parents=True)
    versioned.write_text("")
    link = tmp_path / "bin" / "immich-ml-metal"
    link.parent.mkdir()
    link.symlink_to(versioned)
    assert find_program(str(link)) == (str(link),)


def test_a_cellar_path_becomes_the_prefix_link(tmp_path: Path) -> None:
    inside = tmp_path / "Cellar" / "immich-ml-metal" / "0.1.0" / "bin" / "immich-ml-metal"
    assert stable_path(str(inside)) == str(inside)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "immich-ml-metal").write_text("")
    assert stable_path(str(inside)) == str(tmp_path / "bin" / "immich-ml-metal")


def test_without_an_installed_program_this_python_is_used(tmp_path: Path) -> None:
    command = find_program("/somewhere/pytest", path=str(tmp_path))
    assert command == (sys.executable, "-m", "immich_ml_metal")


def test_the_plan_names_the_files_and_copies_no_secret(tmp_path: Path) -> None:
    settings = Settings(immich_api_key="tell-nobody")  # type: ignore[arg-type]
    config = tmp_path / "c.toml"
    plan = make_plan(settings, ("x",), tmp_path, config_file=config)
    assert plan.command == ("x", "serve", "--config", str(config))
    assert "tell-nobody" not in repr(plan)
    assert plan.stderr_file == tmp_path / "service.stderr"


def test_a_stop_waits_longer_than_the_service_drains(tmp_path: Path) -> None:
    assert make_plan(Settings(), ("x",), tmp_path).stop_timeout_s == 40
    patient = Settings(drain_limit_s=200.5, request_timeout_s=1)
    assert make_plan(patient, ("x",), tmp_path).stop_timeout_s > 200.5


# -- launchd ---------------------------------------------------------------------------------------


def test_the_agent_restarts_after_a_crash_with_a_throttle(
    tmp_path: Path, plan: ServicePlan
) -> None:
    job = plistlib.loads(Launchd(FakeRunner(), tmp_path, 501).render(plan).encode())
    assert job["ProgramArguments"] == list(plan.command)
    assert job["KeepAlive"] == {"SuccessfulExit": False}
    assert job["ThrottleInterval"] == 10
    assert job["RunAtLoad"] is True
    assert job["EnvironmentVariables"]["ML_LOG_FILE"] == str(plan.log_file)
    assert job["StandardErrorPath"] == str(plan.stderr_file)
    assert job["ExitTimeOut"] == plan.stop_timeout_s >= 40
    assert "UserName" not in job


def test_the_agent_is_written_and_loaded_in_place_of_the_old_one(
    tmp_path: Path, plan: ServicePlan
) -> None:
    run = FakeRunner(print=Completed(113))
    agent = Launchd(run, tmp_path, 501)
    agent.install(plan)
    target = "gui/501/immich-ml-metal.service"
    assert agent.definition == tmp_path / "Library/LaunchAgents/immich-ml-metal.service.plist"
    assert plistlib.loads(agent.definition.read_bytes())["Label"] == "immich-ml-metal.service"
    assert agent.definition.stat().st_mode & 0o777 == 0o644
    assert plan.log_file.parent.is_dir()
    assert run.calls[0] == ("launchctl", "bootout", target)
    assert run.calls[-1] == ("launchctl", "bootstrap", "gui/501", str(agent.definition))


def test_the_daemon_runs_as_the_user_in_the_system_domain(
    tmp_path: Path, plan: ServicePlan
) -> None:
    run = FakeRunner(print=Completed(113))
    user = getpass.getuser()
    daemon = Launchd(run, tmp_path, 501, user=user, daemons=tmp_path / "LaunchDaemons")
    daemon.install(plan)
    assert plistlib.loads(daemon.definition.read_bytes())["UserName"] == user
    assert run.calls[-1] == ("launchctl", "bootstrap", "system", str(daemon.definition))


@pytest.mark.parametrize(
    ("printed", "exists", "state", "pid"),
    [
        (Completed(0, PRINTED), True, "running", 4242),
        (Completed(0, PRINTED.replace("pid = 4242", "")), True, "stopped", None),
        (Completed(113), True, "stopped", None),
        (Completed(113), False, "none", None),
    ],
)
def test_launchd_status_is_read(
    tmp_path: Path, printed: Completed, exists: bool, state: str, pid: int | None
) -> None:
    agent = Launchd(FakeRunner(print=printed), tmp_path, 501)
    if exists:
        agent.definition.parent.mkdir(parents=True)
        agent.definition.touch()
    status = agent.status()
    assert (status.state, status.pid) == (state, pid)
    assert status.last_exit == ("6: SIGABRT" if printed.out else "")


@pytest.mark.parametrize("bootout", [Completed(0), Completed(113)])
def test_launchd_restart_lets_the_process_end_by_itself(tmp_path: Path, bootout: Completed) -> None:
    run = FakeRunner(bootout=bootout, print=Completed(113))
    Launchd(run, tmp_path, 501).restart()
    assert run.verbs() == ["bootout", "print", "enable", "bootstrap"]


def test_a_refusal_of_launchd_is_told(tmp_path: Path) -> None:
    refused = Completed(5, err="Bootstrap failed: 5: Input/output error")
    agent = Launchd(FakeRunner(bootstrap=refused, print=Completed(113)), tmp_path, 501)
    with pytest.raises(ServiceFailed, match="launchctl bootstrap: Bootstrap failed: 5"):
        agent.start()


def test_stopping_what_is_not_loaded_is_fine(tmp_path: Path) -> None:
    Launchd(FakeRunner(bootout=Completed(113), print=Completed(113)), tmp_path, 501).stop()
    with pytest.raises(ServiceFailed):
        Launchd(FakeRunner(bootout=Completed(1, err="no")), tmp_path, 501).stop()


def test_uninstalling_leaves_no_definition(tmp_path: Path, plan: ServicePlan) -> None:
    run = FakeRunner(print=Completed(113))
    agent = Launchd(run, tmp_path, 501)
    agent.install(plan)
    agent.uninstall()
    assert not agent.definition.exists()
    assert "bootout" in run.verbs()[-2:]


def test_a_job_that_is_still_ending_is_waited_for(tmp_path: Path, plan: ServicePlan) -> None:
    class Ending(FakeRunner):
        left = 2

        def __call__(self, *args: str) -> Completed:
            if args[1] == "print":
                self.left -= 1
                return Completed(0 if self.left >= 0 else 113, PRINTED)
            return super().__call__(*args)

    run = Ending(bootout=Completed(36))
    Launchd(run, tmp_path, 501).install(plan)
    assert run.left == -1
    assert run.verbs() == ["bootout", "enable", "bootstrap"]


def test_a_daemon_without_rights_says_sudo(tmp_path: Path, plan: ServicePlan) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    daemon = Launchd(FakeRunner(), tmp_path, 501, user=getpass.getuser(), daemons=folder)
    with pytest.raises(ServiceFailed, match="sudo"):
        daemon.install(plan)


def test_a_plist_with_a_missing_program_is_refused(tmp_path: Path, plan: ServicePlan) -> None:
    agent = Launchd(FakeRunner(), tmp_path, 501)
    assert agent.validate(agent.render(plan)) == ""
    Path(plan.command[0]).unlink()
    assert "there is no program" in agent.validate(agent.render(plan))


# -- systemd ---------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_accepts_the_unit_and_finds_a_fault_in_a_broken_one(
    tmp_path: Path, plan: ServicePlan
) -> None:
    unit = Systemd(run_program, tmp_path)
    text = unit.render(plan)
    assert unit.validate(text) == ""
    assert "Failed to parse sec value" in unit.validate(
        text.replace("RestartSec=10", "RestartSec=often")
    )
    missing = text.replace("bin dir", "no such dir")
    assert "immich-ml-metal" in unit.validate(missing)


def test_the_unit_restarts_after_a_crash_and_quotes_its_words(
    tmp_path: Path, plan: ServicePlan
) -> None:
    text = Systemd(FakeRunner(), tmp_path).render(plan)
    assert f'ExecStart="{plan.command[0]}" serve' in text
    assert "Restart=on-failure\nRestartPreventExitStatus=2\nRestartSec=10" in text
    assert f"Environment=ML_LOG_FILE={plan.log_file}" in text
    assert f"TimeoutStopSec={plan.stop_timeout_s}" in text


def test_the_unit_is_enabled_and_started_afresh(tmp_path: Path, plan: ServicePlan) -> None:
    run = FakeRunner()
    unit = Systemd(run, tmp_path)
    unit.install(plan)
    assert unit.definition == tmp_path / "systemd/user/immich-ml-metal.service"
    assert [call[2] for call in run.calls] == ["daemon-reload", "enable", "restart"]
    unit.uninstall()
    assert not unit.definition.exists()


def test_systemd_status_is_read(tmp_path: Path) -> None:
    class Says(FakeRunner):
        text = "ActiveState=active\nMainPID=77\nResult=success\nExecMainStatus=0\n"

        def __call__(self, *args: str) -> Completed:
            return Completed(0, self.text)

    says = Says()
    unit = Systemd(says, tmp_path)
    assert unit.status().state == "none"
    unit.definition.parent.mkdir(parents=True)
    unit.definition.touch()
    assert (unit.status().state, unit.status().pid) == ("running", 77)
    says.text = "ActiveState=failed\nMainPID=0\nResult=signal\nExecMainStatus=6\n"
    assert (unit.status().state, unit.status().last_exit) == ("stopped", "signal 6")


def test_a_refusal_of_systemd_is_told(tmp_path: Path) -> None:
    run = FakeRunner(**{"--user": Completed(1, err="Failed to connect to bus")})
    with pytest.raises(ServiceFailed, match="systemctl --user start: Failed to connect"):
        Systemd(run, tmp_path).start()


# -- choosing --------------------------------------------------------------------------------------


def test_each_system_gets_its_manager() -> None:
    assert isinstance(choose_manager(FakeRunner(), system="Darwin"), Launchd)
    assert isinstance(choose_manager(FakeRunner(), system="Linux"), Systemd)
    with pytest.raises(ServiceFailed, match="Windows"):
        choose_manager(FakeRunner(), system="Windows")
    with pytest.raises(ServiceFailed, match="enable-linger"):
        choose_manager(FakeRunner(), system="Linux", daemon=True)
    assert log_folder("Darwin").parts[-3:] == ("Library", "Logs", "immich-ml-metal")


# -- the command -----------------------------------------------------------------------------------


def run(home: Path, *args: str, **env: str) -> Any:
    path = f"{home / 'tools'}:{os.defpath}"
    return CliRunner(env={"HOME": str(home), "PATH": path, **env}).invoke(app, ["service", *args])


linux = pytest.mark.skipif(sys.platform != "linux", reason="drives the systemd manager")


@linux
def test_print_changes_nothing(home: Path) -> None:
    result = run(home, "install", "--print")
    assert result.exit_code == 0, result.output
    assert "ExecStart=" in result.stdout
    assert not (home / ".config").exists()
    assert not (home / "asked").exists()


@linux
def test_install_then_uninstall(home: Path) -> None:
    result = run(home, "install")
    unit = home / ".config/systemd/user/immich-ml-metal.service"
    assert result.exit_code == 0, result.output
    assert unit.is_file()
    assert "--user restart immich-ml-metal.service" in (home / "asked").read_text()
    assert run(home, "uninstall").exit_code == 0
    assert not unit.exists()


@linux
def test_the_settings_file_of_config_init_is_picked_up(home: Path) -> None:
    file = home / ".config/immich-ml-metal/config.toml"
    CliRunner(env={"HOME": str(home)}).invoke(app, ["config", "init"])
    assert file.is_file()
    assert f"serve --config {file}" in run(home, "install", "--print").stdout


@linux
def test_what_is_in_force_is_shown_and_written_for_its_owner_alone(home: Path) -> None:
    caller = {"ML_PROFILE": "exact", "IMMICH_PORT": "4711", "ML_IMMICH_API_KEY": "tell-nobody"}
    file = home / ".config/immich-ml-metal/config.toml"
    shown = run(home, "install", "--print", **caller).stdout
    assert 'profile = "exact"' in shown
    assert "tell-nobody" not in shown
    assert not file.exists()
    result = run(home, "install", **caller)
    assert result.exit_code == 0, result.output
    assert "tell-nobody" not in result.output
    assert file.stat().st_mode & 0o077 == 0
    kept = load_settings(environ={}, file=file)
    assert (kept.profile, kept.port) == ("exact", 4711)
    assert kept.immich_api_key is not None
    unit = home / ".config/systemd/user/immich-ml-metal.service"
    assert f"serve --config {file}" in unit.read_text()


@linux
def test_a_failed_install_leaves_nothing(home: Path) -> None:
    (home / "tools" / "systemctl").write_text("#!/bin/sh\nexit 1\n")
    result = run(home, "install", ML_PROFILE="exact")
    assert isinstance(result.exception, ServiceFailed)
    assert not (home / ".config/systemd/user/immich-ml-metal.service").exists()
    assert not (home / ".config/immich-ml-metal/config.toml").exists()


@linux
def test_a_wrong_setting_ends_the_service_for_good_and_a_taken_address_does_not() -> None:
    assert exit_code(ConfigError("x")) == 2
    assert exit_code(CannotListen("x")) == 1


def test_launchd_which_restarts_what_fails_is_told_that_a_wrong_setting_is_no_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XPC_SERVICE_NAME", JOB)
    assert (exit_code(ConfigError("x")), exit_code(CannotListen("x"))) == (0, 1)
    monkeypatch.setenv("XPC_SERVICE_NAME", "application.com.apple.Terminal.1")
    assert exit_code(ConfigError("x")) == 2


@linux
def test_an_installed_service_is_started_stopped_and_restarted(home: Path) -> None:
    run(home, "install")
    for command, word in (("start", "Started."), ("stop", "Stopped."), ("restart", "Restarted.")):
        assert run(home, command).stdout == f"{word}\n"
        asked = (home / "asked").read_text().splitlines()
        assert asked[-1] == f"--user {command} immich-ml-metal.service"


@linux
def test_a_daemon_is_refused_on_linux(home: Path) -> None:
    result = run(home, "install", "--daemon")
    assert isinstance(result.exception, ServiceFailed)


@linux
def test_commands_on_nothing_installed_say_so(home: Path) -> None:
    for command in ("start", "stop", "restart"):
        result = run(home, command)
        assert result.exit_code == 1
        assert "service install" in result.stderr


@linux
@pytest.mark.parametrize(("version", "code"), [(__version__, 0), ("0.0.9", 1)])
def test_status_notices_an_old_process_still_serving(
    home: Path, loopback: Callable[[Any], str], version: str, code: int
) -> None:
    async def root(_: Request) -> Response:
        return JSONResponse({"message": "Immich ML"})

    async def health(_: Request) -> Response:
        return JSONResponse({"version": version})

    url = loopback(Starlette(routes=[Route("/", root), Route("/health", health)]))
    run(home, "install", ML_PORT=url.rpartition(":")[2])
    result = run(home, "status", ML_PORT="1")  # the caller's is not the service's
    assert result.exit_code == code, result.output
    assert "running, process 99" in result.stdout
    assert ("is still serving" in result.stdout) == bool(code)
    report = json.loads(run(home, "status", "--json").stdout)
    assert (report["serving"], report["installed"]) == (version, __version__)


@linux
def test_logs_are_printed_with_their_names(home: Path) -> None:
    assert run(home, "logs").exit_code == 1
    folder = home / ".local/state/immich-ml-metal"
    folder.mkdir(parents=True)
    (folder / "service.log").write_text("one\ntwo\nthree\n")
    (folder / "service.worker.log").write_text("loaded\n")
    out = run(home, "logs", "-n", "2").stdout
    assert f"==> {folder / 'service.log'} <==\ntwo\nthree\n" in out
    assert "loaded" in out
    assert tail(folder / "service.log", 1) == ["three"]


def test_following_survives_growth_rotation_and_absence(tmp_path: Path) -> None:
    file = tmp_path / "x.log"
    file.write_text("old\n")
    text, seen = new_text(file, file.stat().st_size)
    assert text == ""
    with file.open("a") as stream:
        stream.write("new\n")
    text, seen = new_text(file, seen)
    assert text == "new\n"
    file.write_text("cut\n")  # emptied in place, then written again
    text, seen = new_text(file, seen)
    assert text == "cut\n"
    file.unlink()
    text, seen = new_text(file, seen)
    assert (text, seen) == ("", 0)
    file.write_text("fresh\n")
    assert new_text(file, seen)[0] == "fresh\n"


# -- the runner and the wake assertion -------------------------------------------------------------


def test_the_runner_reports_and_never_raises() -> None:
    done = run_program(sys.executable, "-c", "import sys; print('out'); sys.exit(3)")
    assert (done.code, done.out) == (3, "out\n")
    assert run_program("/no/such/program").code == 127


def make_keep_awake(clock: Clock) -> tuple[KeepAwake, "list[subprocess.Popen[bytes]]"]:
    started: list[subprocess.Popen[bytes]] = []

    def start() -> "subprocess.Popen[bytes]":
        started.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]))
        return started[-1]

    return KeepAwake(start, linger_s=60, clock=clock), started


def test_the_mac_is_kept_awake_from_the_first_request_until_a_while_after_the_last() -> None:
    clock = Clock(0)
    awake, started = make_keep_awake(clock)
    awake.begin()
    awake.begin()
    assert len(started) == 1
    awake.end()
    clock.now_s = 100
    awake.tick()
    assert started[0].poll() is None  # one is still being worked on
    awake.end()
    clock.now_s = 159
    awake.tick()
    assert started[0].poll() is None
    clock.now_s = 160
    awake.tick()
    assert started[0].poll() is not None


def test_new_work_takes_a_new_assertion_and_close_lets_go() -> None:
    awake, started = make_keep_awake(Clock(0))
    awake.begin()
    awake.close()
    awake.begin()
    assert len(started) == 2
    awake.close()
    assert all(process.poll() is not None for process in started)
