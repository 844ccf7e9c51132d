"""Every check in the order of cause and effect, and which failure is the cause of the others."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from immich_ml_metal.doctor import machine_checks as machine
from immich_ml_metal.doctor import service_checks as service
from immich_ml_metal.doctor.facts import Answer, Facts, Outcome


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report.

    Attributes:
        name: of the check.
        text: what was found.
        fix: what to do, a command where there is one.
        follows: name of the failed check that explains this failure; empty for a cause.
    """

    name: str
    level: Outcome
    text: str
    fix: str = ""
    follows: str = ""


@dataclass(frozen=True, slots=True)
class Check:
    """A question about the facts.

    Attributes:
        after: checks whose failure explains a failure of this one.
    """

    name: str
    ask: Callable[[Facts], Answer]
    after: tuple[str, ...] = ()


_BASE = ("architecture", "system", "python", "packages", "settings")
_MODELS = ("model names", "model folder", "disk", "hub", "models")

CHECKS = (
    Check("architecture", machine.check_architecture),
    Check("system", machine.check_system),
    Check("python", machine.check_python, after=("architecture",)),
    Check("packages", machine.check_packages, after=("architecture", "system", "python")),
    Check("settings", machine.check_settings),
    Check("clock", service.check_clock),
    Check("memory", machine.check_memory),
    Check("disk", machine.check_disk),
    Check("model folder", machine.check_models_dir, after=("settings", "disk")),
    Check("state folder", machine.check_state_dir, after=("settings",)),
    Check("model names", machine.check_names, after=("settings",)),
    Check("hub", machine.check_hub, after=("settings", "clock")),
    Check("models", machine.check_models, after=("settings", "model folder", "disk", "hub")),
    Check("port", service.check_port, after=("settings",)),
    Check("version", service.check_version),
    Check(
        "engines",
        service.check_engines,
        after=(*_BASE, *_MODELS, "memory", "port", "version"),
    ),
    Check("verdicts", service.check_verdicts),
    Check("start at boot", service.check_service, after=(*_BASE, "port")),
    Check("privacy", service.check_privacy, after=("start at boot",)),
    Check("address", service.check_address),
    Check("index", service.check_index),
    Check("immich", service.check_immich, after=("settings", "model names", "port")),
    Check("queues", service.check_queues, after=(*_BASE, *_MODELS, "engines", "immich")),
    Check("sleep", service.check_sleep),
    Check("logs", service.check_logs),
)


def examine(checks: Sequence[Check], facts: Facts) -> list[Finding]:
    """Ask every check in order; a failure that an earlier one explains points to it.

    It is a warning then: what is to be mended is the cause alone.
    """
    findings: dict[str, Finding] = {}
    for check in checks:
        level, text, fix = check.ask(facts)
        finding = Finding(check.name, level, text, fix)
        if level is Outcome.FAIL and (cause := _cause(check, findings)):
            finding = replace(finding, level=Outcome.WARN, follows=cause)
        findings[check.name] = finding
    return list(findings.values())


def first_cause(findings: Sequence[Finding]) -> Finding | None:
    """The failure to fix first: the first one, as what another explains is none."""
    return next((f for f in findings if f.level is Outcome.FAIL), None)


def _cause(check: Check, findings: dict[str, Finding]) -> str:
    for name in check.after:
        earlier = findings.get(name)
        if earlier is not None and (earlier.level is Outcome.FAIL or earlier.follows):
            return earlier.follows or name
    return ""
