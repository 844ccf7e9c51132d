"""`doctor`: one screen of checks, the cause first, a fix for each failure."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from immich_ml_metal import __version__
from immich_ml_metal.cli.exits import Exit
from immich_ml_metal.cli.json_output import JsonOption, print_json

if TYPE_CHECKING:
    from immich_ml_metal.doctor.facts import EngineTest, Facts
    from immich_ml_metal.doctor.result import Result
    from immich_ml_metal.immich.advice import Advice
    from immich_ml_metal.immich.api import ServerSettings
    from immich_ml_metal.parity.client import ModelNames
    from immich_ml_metal.settings import Settings

_MARKS = MappingProxyType(
    {
        "ok": "[green]ok  [/]",
        "warn": "[yellow]warn[/]",
        "fail": "[red]FAIL[/]",
        "skip": "[dim]-   [/]",
    }
)


ConfigOption = Annotated[Path | None, typer.Option("--config", help="Settings file (TOML).")]
EnvFileOption = Annotated[Path | None, typer.Option(help="An Immich .env file.")]
VerifyOption = Annotated[
    bool, typer.Option("--verify", help="Read every model file and compare its digest.")
]
TestOption = Annotated[bool, typer.Option("--test/--no-test", help="Ask every task for real.")]
ShareOption = Annotated[
    Path | None, typer.Option("--share", help="Write a zip without anything private.")
]


def doctor(
    file: ConfigOption = None,
    env_file: EnvFileOption = None,
    verify: VerifyOption = False,
    test: TestOption = True,
    share: ShareOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check the installation and say what to do, the cause of the trouble first.

    Exit code: 0 nothing is broken, 1 something is.
    """
    from immich_ml_metal.cli.config import default_file
    from immich_ml_metal.doctor.checks import CHECKS
    from immich_ml_metal.doctor.result import examine, first_cause

    file = file or default_file()
    settings, config_error = _load(file, env_file)
    facts = _collect(settings, config_error, verify=verify)
    if test and not config_error:
        options = {"--config": str(file or ""), "--env-file": str(env_file or "")}
        facts = replace(facts, tests=_self_test(settings, facts, options))
    results = examine(CHECKS, facts)
    cause = first_cause(results)
    if share is not None:
        _share(share, facts, results, settings)
    if as_json:
        words = {"cause": cause and cause.name, "checks": [asdict(result) for result in results]}
        print_json(words)
    else:
        _print(results, cause)
    raise typer.Exit(Exit.FINDING if cause else Exit.OK)


def _load(file: Path | None, env_file: Path | None) -> "tuple[Settings, str]":
    """The settings, or the defaults and why the settings are refused."""
    from immich_ml_metal.errors import ConfigError
    from immich_ml_metal.settings import Settings
    from immich_ml_metal.settings_sources import load_settings

    try:
        return load_settings(file=file, env_file=env_file), ""
    except ConfigError as exc:
        return Settings(), str(exc)


def _collect(settings: "Settings", config_error: str, *, verify: bool) -> "Facts":
    from immich_ml_metal.doctor import collect
    from immich_ml_metal.doctor.facts import Facts
    from immich_ml_metal.logs import FILE_BYTES, FILES_KEPT
    from immich_ml_metal.system.network import lan_addresses
    from immich_ml_metal.system.programs import run_program

    machine = collect.read_machine(run_program)
    folder_error, free_bytes = collect.read_models_dir(settings)
    server, immich, immich_error = _ask_immich(settings)
    names = _names(settings, server)
    models = collect.read_models(settings, (names.clip, names.faces, names.ocr), digests=verify)
    hub, skew_s = collect.read_hub(settings, _hub(settings), time.time())
    port = collect.read_port(settings, run_program)
    logs = _logs(settings)
    return Facts(
        version=__version__,
        machine=machine,
        host=settings.host,
        port=port,
        packages=collect.read_packages(machine),
        config_error=config_error,
        models_dir=str(settings.models_dir),
        models_dir_error=folder_error,
        disk_free_bytes=free_bytes,
        models=models,
        names=names,
        hub=hub,
        addresses=tuple(lan_addresses()),
        service=_service_state(),
        immich=immich,
        immich_error=immich_error,
        clock_skew_s=skew_s,
        logs_bytes=collect.size_of_logs(logs),
        log_limit_bytes=2 * FILE_BYTES * (FILES_KEPT + 1),
    )


def _ask_immich(
    settings: "Settings",
) -> "tuple[ServerSettings | None, tuple[Advice, ...] | None, str]":
    from contextlib import closing

    from immich_ml_metal.cli.immich import our_side
    from immich_ml_metal.immich.advice import advise
    from immich_ml_metal.immich.api import ImmichError, connect

    if settings.immich_url is None or settings.immich_api_key is None:
        return None, None, ""
    try:
        with closing(connect(settings.immich_url, settings.immich_api_key)) as api:
            server = api.settings()
    except ImmichError as exc:
        return None, None, str(exc)
    return server, tuple(advise(server, our_side(settings, server, measure=False))), ""


def _names(settings: "Settings", server: "ServerSettings | None") -> "ModelNames":
    """The models that will really be asked for: Immich's, where it could be asked."""
    from immich_ml_metal.parity.client import ModelNames
    from immich_ml_metal.types import Task

    asked = server.models if server is not None else {}
    return ModelNames(
        clip=asked.get(Task.CLIP, settings.clip_model),
        faces=asked.get(Task.FACES, settings.face_model),
        ocr=asked.get(Task.OCR, settings.ocr_model),
    )


def _hub(settings: "Settings") -> str:
    from huggingface_hub.constants import ENDPOINT

    return settings.hub_endpoint or ENDPOINT


def _self_test(
    settings: "Settings", facts: "Facts", options: Mapping[str, str]
) -> "tuple[EngineTest, ...]":
    """Ask the running service, or one started for the purpose in a process of its own."""
    from immich_ml_metal.client.child import ServiceDidNotStart, running_service
    from immich_ml_metal.client.drawing import draw_preview
    from immich_ml_metal.client.own_service import NotServing, ask_health, local_url, wake_worker
    from immich_ml_metal.doctor.facts import EngineTest
    from immich_ml_metal.doctor.selftest import run_tests

    missing = {model.name for model in facts.models if model.problem or not model.is_present}
    picture = draw_preview(0)

    def test(url: str) -> "tuple[EngineTest, ...]":
        wake_worker(url)
        return run_tests(url, ask_health(url).engines, missing, facts.names, picture)

    try:
        if facts.port.state == "ours":
            return test(local_url(settings))
        with running_service({k: v for k, v in options.items() if v}) as child:
            return test(child.url)
    except (ServiceDidNotStart, NotServing) as exc:
        return (EngineTest("service", "-", "-", error=str(exc)),)


def _service_state() -> Literal["running", "stopped", "none"]:
    from immich_ml_metal.service.choose import choose_manager
    from immich_ml_metal.service.plan import ServiceFailed
    from immich_ml_metal.system.programs import run_program

    try:
        return choose_manager(run_program).status().state
    except ServiceFailed:
        return "none"


def _logs(settings: "Settings") -> list[Path]:
    from immich_ml_metal.logs import file_of, stderr_of
    from immich_ml_metal.service.choose import log_folder

    log = settings.log_file or log_folder() / "service.log"
    return [file_of(log, "gateway"), file_of(log, "worker"), stderr_of(log)]


def _share(path: Path, facts: "Facts", results: "Sequence[Result]", settings: "Settings") -> None:
    from immich_ml_metal.doctor.share import write_bundle

    write_bundle(path, facts, results, settings, _logs(settings))
    typer.echo(f"Wrote {path}; look into it before you attach it to an issue.", err=True)


def _print(results: "Sequence[Result]", cause: "Result | None") -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    if cause is not None:
        console.print(f"[bold red]Fix first: {cause.name}[/]")
        console.print(Text(f"  {cause.text}"))
        if cause.fix:
            console.print(Text(f"  {cause.fix}", style="bold"))
        console.print()
    table = Table(box=None, show_header=False, padding=(0, 1))
    for result in results:
        text = Text(result.text)
        if result.follows:
            text.append(f"\nfollows from {result.follows}", style="dim")
        elif result.fix and result is not cause:
            text.append(f"\n{result.fix}", style="cyan")
        table.add_row(_MARKS[result.level], result.name, text)
    console.print(table)
