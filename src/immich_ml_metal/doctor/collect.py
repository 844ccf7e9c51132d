"""Collect the facts of this machine. Asks the system, never changes it."""

import contextlib
import platform
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from email.utils import parsedate_to_datetime
from importlib import metadata
from pathlib import Path
from typing import Literal, TypedDict

import httpx
import psutil

from immich_ml_metal import __version__
from immich_ml_metal.catalog import find_by_name
from immich_ml_metal.client.calls import ModelNames, configured_names
from immich_ml_metal.client.own_service import NotServing, ask_health, local_url
from immich_ml_metal.doctor.facts import EngineChoice, Facts, Machine, ModelFact, Port
from immich_ml_metal.errors import ConfigError, UnknownModel
from immich_ml_metal.immich.advice import Advice, advise
from immich_ml_metal.immich.api import ImmichError, ServerSettings, connect
from immich_ml_metal.immich.our_side import look_at_ours
from immich_ml_metal.index_guard.guard import IndexGuard
from immich_ml_metal.models.shelf import FileState, check_part
from immich_ml_metal.models.store import ModelStore
from immich_ml_metal.qualification.plan import Choices, remembered_choices
from immich_ml_metal.service.choose import choose_manager
from immich_ml_metal.service.log_files import log_files
from immich_ml_metal.service.mac_privacy import unreadable, used_paths
from immich_ml_metal.service.plan import ServiceFailed
from immich_ml_metal.settings import Settings
from immich_ml_metal.settings_sources import load_settings, settings_file
from immich_ml_metal.system.network import lan_addresses
from immich_ml_metal.system.network_settings import network_troubles
from immich_ml_metal.system.programs import RunProgram
from immich_ml_metal.types import ModelKey, Task

CONNECT_TIMEOUT_S = 2.0
HUB_TIMEOUT_S = 5.0
_EVERYWHERE = ("onnxruntime", "numpy", "pillow", "opencv-python-headless", "tokenizers")
_APPLE_SILICON = ("mlx", "pyobjc-framework-Vision", "pyobjc-framework-CoreML")


def collect_facts(run: RunProgram, *, env_file: Path | None, digests: bool) -> Facts:
    """All facts but the self-test's; `digests` reads every model file to its end."""
    settings, config_error = _read_settings(env_file)
    folder_error, free_bytes = read_folder(settings.models_dir.expanduser())
    server, immich, immich_error = ask_immich(settings)
    hub, skew_s = _ask_hub(settings, config_error)
    return Facts(
        version=__version__,
        machine=(machine := read_machine(run)),
        settings=settings,
        port=read_port(settings, run),
        packages=read_packages(machine),
        config_error=config_error,
        models_dir_error=folder_error,
        state_dir_error=read_folder(settings.state_folder)[0],
        unreadable=tuple(ModelStore(settings).shelf.unreadable()),
        disk_free_bytes=free_bytes,
        names=(names := _names(settings, server)),
        models=read_models(settings, (names.clip, names.faces, names.ocr), digests=digests),
        hub=hub,
        addresses=tuple(lan_addresses()),
        **read_service(run),
        immich=immich,
        immich_error=immich_error,
        clock_skew_s=skew_s,
        logs_bytes=size_of_logs(log_files(settings)),
        index=tuple(IndexGuard(settings).findings()),
        choices=read_choices(settings),
        closed=tuple(unreadable(used_paths(settings, settings_file()), Path.home())),
    )


def _ask_hub(settings: Settings, config_error: str) -> tuple[str, float | None]:
    """Whether the hub is reachable; not asked where settings are refused, as they may forbid it."""
    if config_error:
        return "not asked, as the settings are refused", None
    troubles = network_troubles()
    if troubles and not settings.offline:
        return "; ".join(troubles), None
    from huggingface_hub.constants import ENDPOINT  # refuses variables that were just looked at

    return read_hub(settings, settings.hub_endpoint or ENDPOINT, time.time())


def _read_settings(env_file: Path | None) -> tuple[Settings, str]:
    """The settings, or the defaults and why the settings are refused."""
    try:
        return load_settings(env_file=env_file), ""
    except ConfigError as exc:
        return Settings(), str(exc)


def ask_immich(
    settings: Settings,
) -> tuple[ServerSettings | None, tuple[Advice, ...] | None, str]:
    """Immich's settings and the advice on them; why it could not be asked."""
    if settings.immich_url is None or settings.immich_api_key is None:
        return None, None, ""
    try:
        with closing(connect(settings.immich_url, settings.immich_api_key)) as api:
            server = api.settings()
    except ImmichError as exc:
        return None, None, str(exc)
    return server, tuple(advise(server, look_at_ours(settings, server, measure=False))), ""


def _names(settings: Settings, server: ServerSettings | None) -> ModelNames:
    """The models that will really be asked for: Immich's, where it could be asked."""
    ours, asked = configured_names(settings), server.models if server is not None else {}
    return ModelNames(
        clip=asked.get(Task.CLIP, ours.clip),
        faces=asked.get(Task.FACES, ours.faces),
        ocr=asked.get(Task.OCR, ours.ocr),
    )


class AtBoot(TypedDict):
    """The facts about the installed service, by their names."""

    service: Literal["running", "stopped", "none"]
    service_error: str


def read_service(run: RunProgram) -> AtBoot:
    """Whether the service is installed to start at boot, and runs; why that is not known."""
    try:
        return AtBoot(service=choose_manager(run).status().state, service_error="")
    except ServiceFailed:
        return AtBoot(service="none", service_error="")
    except OSError as exc:  # where HOME may not be entered
        return AtBoot(service="none", service_error=f"{exc.filename}: {exc.strerror}")


def read_machine(run: RunProgram) -> Machine:
    """The computer, its operating system and this Python."""
    memory = psutil.virtual_memory()
    system = platform.system()
    return Machine(
        system=system,
        arch=platform.machine(),
        is_translated=system == "Darwin"
        and run("sysctl", "-n", "sysctl.proc_translated").out.strip() == "1",
        release=platform.mac_ver()[0],
        python=sys.version_info[:3],
        memory_bytes=memory.total,
        memory_free_bytes=memory.available,
        sleep_min=parse_sleep(run("pmset", "-g", "custom").out) if system == "Darwin" else None,
    )


def parse_sleep(text: str) -> int | None:
    """Minutes until sleep on mains power, out of `pmset -g custom`; None when it does not say."""
    on_mains = False
    for line in text.splitlines():
        if line.endswith("Power:"):
            on_mains = line.startswith("AC")
        words = line.split()
        if on_mains and len(words) > 1 and words[0] == "sleep" and words[1].isdigit():
            return int(words[1])
    return None


def read_packages(machine: Machine) -> dict[str, str | None]:
    """The packages this platform computes with, and their versions."""
    names: list[str] = list(_EVERYWHERE)
    if machine.system == "Darwin" and machine.arch == "arm64":
        names += _APPLE_SILICON
    return {name: _version(name) for name in names}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def read_port(settings: Settings, run: RunProgram) -> Port:
    """Who answers on our port."""
    url, number = local_url(settings), settings.port
    try:
        health = ask_health(url)
    except NotServing:
        host = httpx.URL(url).host
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.settimeout(CONNECT_TIMEOUT_S)
            if probe.connect_ex((host, number)) != 0:
                return Port(number, "free")
        return Port(number, "taken", holder=_holder(number, run))
    if health.version:
        return Port(number, "ours", version=health.version, health=health.raw)
    return Port(number, "other_ml", holder=_holder(number, run))


def _holder(port: int, run: RunProgram) -> str:
    """The program that listens, as far as this user may see."""
    lines = run("lsof", "-nP", f"-iTCP:{port}", "-sTCP:LISTEN", "-Fcp").out.splitlines()
    found = {line[0]: line[1:] for line in lines if line}
    if {"p", "c"} <= found.keys():
        return f"{found['c']}, process {found['p']}"
    try:
        for connection in psutil.net_connections("tcp"):
            at = connection.laddr
            if (
                connection.status == psutil.CONN_LISTEN
                and at
                and at.port == port
                and connection.pid
            ):
                return f"{psutil.Process(connection.pid).name()}, process {connection.pid}"
    except psutil.Error:
        return ""
    return ""


def read_folder(folder: Path) -> tuple[str, int]:
    """Why a folder cannot be written (empty when it can), and the free bytes around it."""
    existing = next(path for path in (folder, *folder.parents) if _exists(path))
    try:
        free_bytes = psutil.disk_usage(str(existing)).free
    except OSError as exc:
        return (exc.strerror or str(exc)).lower(), 0
    try:
        with tempfile.TemporaryFile(dir=existing):
            return "", free_bytes
    except OSError as exc:
        return (exc.strerror or str(exc)).lower(), free_bytes


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # behind a folder that may not be entered
        return False


def read_models(
    settings: Settings, names: Sequence[str], *, digests: bool
) -> tuple[ModelFact, ...]:
    """The state on disk of every named model; `digests` reads each file to its end."""
    store = ModelStore(settings)
    try:
        return tuple(_read_model(store, name, digests=digests) for name in names)
    finally:
        store.close()


def _read_model(store: ModelStore, name: str, *, digests: bool) -> ModelFact:
    try:
        spec = find_by_name(name)
    except UnknownModel as exc:
        return ModelFact(name, is_present=False, problem=str(exc))
    is_present = True
    for part in spec.parts:
        key = spec.key(part)
        states = check_part(store.shelf.root(key), spec, part, digests=digests)
        damaged = [path for path, state in states.items() if state is FileState.DAMAGED]
        if damaged:
            return ModelFact(spec.name, is_present=True, problem=f"{damaged[0]} is damaged")
        is_present = is_present and store.locate(key) is not None
    return ModelFact(spec.name, is_present)


def read_choices(settings: Settings) -> tuple[EngineChoice, ...]:
    """Who answers the configured models that are here, by what is remembered."""
    with closing(ModelStore(settings)) as store:
        choices = remembered_choices(settings, store)
        try:
            keys = choices.configured().values()
        except ConfigError:  # the check of the settings says so
            return ()
        found = [_choice(choices, key) for key in keys if choices.store.locate(key) is not None]
    if trouble := choices.record.trouble:
        found.append(EngineChoice("", warning=f"verdicts are not remembered: {trouble}"))
    return tuple(found)


def _choice(choices: Choices, key: ModelKey) -> EngineChoice:
    choice = choices.answering(key)
    told = f"{key} on {choice.candidate}"
    if (judged := choices.entry(key).judged.get(choice.candidate)) is not None:
        figures = judged.verdict.figures
        told += f", cosine {figures.cosine:.7f}" if figures.cosine is not None else ""
        told += f", {figures.alone_ms:.0f} ms" if figures.alone_ms is not None else ""
    return EngineChoice(told, choice.is_pending, choice.warning)


def read_hub(settings: Settings, endpoint: str, now_s: float) -> tuple[str, float | None]:
    """Why the hub is not reachable (empty when it is), and our clock minus the hub's."""
    if settings.offline:
        return "offline", None
    try:
        reply = httpx.head(endpoint, timeout=HUB_TIMEOUT_S, follow_redirects=False)
    except (httpx.HTTPError, httpx.InvalidURL, ImportError, OSError, ValueError) as exc:
        return f"{endpoint} is not reachable ({str(exc) or type(exc).__name__})", None
    problem = f"{endpoint} answers {reply.status_code}" if reply.is_server_error else ""
    return problem, clock_skew(reply.headers.get("Date", ""), now_s)


def clock_skew(date: str, now_s: float) -> float | None:
    """Our clock minus the `Date` of an answer, in seconds."""
    try:
        return now_s - parsedate_to_datetime(date).timestamp()
    except (TypeError, ValueError):
        return None


def size_of_logs(files: Sequence[Path]) -> int | None:
    """Bytes of the log files with their rotated ones; None where they may not be looked at."""
    with contextlib.suppress(PermissionError):
        found = {path for file in files for path in file.parent.glob(f"{file.name}*")}
        return sum(path.stat().st_size for path in found if path.is_file())
    return None
