"""Everything the checks look at, as plain data: collected once, or made up by a test."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

from immich_ml_metal.client.calls import ModelNames
from immich_ml_metal.immich.advice import Advice
from immich_ml_metal.index_guard.guard import IndexFinding
from immich_ml_metal.settings import Settings


@dataclass(frozen=True, slots=True)
class Machine:
    """The computer and its operating system.

    Attributes:
        system: `Darwin` or `Linux`.
        arch: of this Python process: `arm64`, `x86_64`, ...
        is_translated: whether Rosetta runs this process.
        release: macOS version, `14.5`; empty elsewhere.
        sleep_min: minutes until the machine sleeps on mains power; 0 never, None unknown.
    """

    system: str
    arch: str
    is_translated: bool
    release: str
    python: tuple[int, int, int]
    memory_bytes: int
    memory_free_bytes: int
    sleep_min: int | None = None


@dataclass(frozen=True, slots=True)
class Port:
    """Who has our port: nobody, this service, another such service, or something else."""

    number: int
    state: Literal["free", "ours", "other_ml", "taken"]
    version: str = ""  # of the service that answers
    holder: str = ""  # program and process id, where the system tells
    health: Mapping[str, Any] = field(default_factory=dict)  # what it says of itself; its JSON


@dataclass(frozen=True, slots=True)
class ModelFact:
    """One configured model on disk; `problem` is empty when it is whole."""

    name: str
    is_present: bool
    problem: str = ""

    @property
    def is_unknown(self) -> bool:
        """Whether no official model has this name."""
        return bool(self.problem) and not self.is_present


@dataclass(frozen=True, slots=True)
class EngineTest:
    """One task asked for real; `error` is empty when it answered, `skipped` says why it was not."""

    task: str
    engine: str
    model: str
    error: str = ""
    skipped: str = ""


@dataclass(frozen=True, slots=True)
class EngineChoice:
    """Who answers one half of a model, by what is remembered; `warning` is empty when all is well.

    Attributes:
        told: `ViT-B-32__openai/visual on mlx float16, cosine 0.9999988, 9 ms`.
        is_pending: no verdict yet that holds now.
    """

    told: str
    is_pending: bool = False
    warning: str = ""


@dataclass(frozen=True, slots=True)
class Facts:
    """All there is to know.

    Attributes:
        settings: in force; the defaults where they are refused.
        config_error: why the settings are refused; empty when they are not.
        packages: needed package → installed version; None when missing.
        models_dir_error: why the model folder cannot be written; empty when it can.
        state_dir_error: why nothing can be remembered between starts; empty when it can.
        unreadable: each folder of models that cannot be read, and why.
        names: the models that are asked for: Immich's, where it could be asked.
        hub: "" reachable, "offline" switched off, else why it is not reachable.
        addresses: of this machine, as others see it.
        service: what is installed to start at boot: `running`, `stopped` or `none`.
        service_error: why that cannot be known.
        immich: advice from the Immich server; None when no server is configured.
        immich_error: why the server could not be asked.
        clock_skew_s: our clock minus a server's; None unknown.
        logs_bytes: size of all log files; None where they may not be looked at.
        index: what the index guard knows of each model.
        choices: who answers each configured model that is here, by what is remembered.
        closed: what the installed service uses and macOS keeps from jobs.
    """

    version: str
    machine: Machine
    settings: Settings
    port: Port
    packages: Mapping[str, str | None] = field(default_factory=dict)
    config_error: str = ""
    models_dir_error: str = ""
    state_dir_error: str = ""
    unreadable: tuple[str, ...] = ()
    disk_free_bytes: int = 0
    models: tuple[ModelFact, ...] = ()
    names: ModelNames = field(default_factory=lambda: ModelNames("", "", ""))
    hub: str = ""
    tests: tuple[EngineTest, ...] = ()
    addresses: tuple[str, ...] = ()
    service: Literal["running", "stopped", "none"] = "none"
    service_error: str = ""
    immich: tuple[Advice, ...] | None = None
    immich_error: str = ""
    clock_skew_s: float | None = None
    logs_bytes: int | None = 0
    index: tuple[IndexFinding, ...] = ()
    choices: tuple[EngineChoice, ...] = ()
    closed: tuple[Path, ...] = ()


class Outcome(StrEnum):
    """How a check came out."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"
    SKIP = "skip"


# What a check answers: how it came out, what was found, and what to do.
Answer = tuple[Outcome, str, str]
