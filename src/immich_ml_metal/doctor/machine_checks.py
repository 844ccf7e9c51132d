"""Checks of the machine, the installation and the disk. Each answers (outcome, finding, fix)."""

from immich_ml_metal.doctor.facts import Answer, Facts, Outcome
from immich_ml_metal.gateway import remedies
from immich_ml_metal.setting_kinds import format_bytes

MIN_PYTHON = (3, 11)
MIN_MACOS = 14  # MLX's wheels
MIN_FREE_MEMORY_BYTES = 1_000_000_000  # the default models on the CPU hold 2.1 GB at their peak
GOOD_FREE_MEMORY_BYTES = 3_000_000_000
MIN_FREE_DISK_BYTES = 2_000_000_000  # the default models are about 1 GB
GOOD_FREE_DISK_BYTES = 5_000_000_000


def check_architecture(facts: Facts) -> Answer:
    """Rosetta has no MLX, an Intel Mac nothing at all."""
    machine = facts.machine
    if machine.is_translated:
        return (
            Outcome.FAIL,
            "this Python runs under Rosetta (x86_64 on Apple Silicon): no GPU, no Neural Engine",
            "install a native Python and reinstall: "
            "arch -arm64 uv tool install --force --python 3.12 immich-ml-metal",
        )
    if machine.system == "Darwin" and machine.arch != "arm64":
        what = f"an Intel Mac ({machine.arch}): ONNX Runtime has no package for it"
        return Outcome.FAIL, what, "run the service on Apple Silicon or on Linux"
    return Outcome.OK, f"{machine.system} {machine.arch}", ""


def check_system(facts: Facts) -> Answer:
    """MLX needs macOS 14."""
    machine = facts.machine
    if machine.system != "Darwin":
        return Outcome.OK, f"{machine.system}: the CPU engine", ""
    major = machine.release.partition(".")[0]
    if major.isdigit() and int(major) < MIN_MACOS:
        return Outcome.FAIL, f"macOS {machine.release}, needs {MIN_MACOS}", "update macOS"
    return Outcome.OK, f"macOS {machine.release}", ""


def check_python(facts: Facts) -> Answer:
    """The oldest Python the wheels exist for."""
    shown = ".".join(map(str, facts.machine.python))
    if facts.machine.python[:2] < MIN_PYTHON:
        needed = ".".join(map(str, MIN_PYTHON))
        fix = "uv tool install --force --python 3.12 immich-ml-metal"
        return Outcome.FAIL, f"Python {shown}, needs {needed}", fix
    return Outcome.OK, f"Python {shown}", ""


def check_packages(facts: Facts) -> Answer:
    """Every wheel that this platform needs is installed."""
    missing = [name for name, version in facts.packages.items() if version is None]
    if missing:
        fix = "uv tool install --force immich-ml-metal"
        return Outcome.FAIL, f"not installed: {', '.join(missing)}", fix
    shown = ", ".join(f"{name} {version}" for name, version in facts.packages.items())
    return Outcome.OK, shown, ""


def check_settings(facts: Facts) -> Answer:
    """The settings are valid."""
    if facts.config_error:
        return Outcome.FAIL, facts.config_error, "correct it, then: immich-ml-metal config check"
    return Outcome.OK, "valid", ""


def check_memory(facts: Facts) -> Answer:
    """There is room for the models."""
    free, total = facts.machine.memory_free_bytes, facts.machine.memory_bytes
    shown = f"{format_bytes(free)} of {format_bytes(total)} free"
    if free < MIN_FREE_MEMORY_BYTES:
        needed = format_bytes(MIN_FREE_MEMORY_BYTES)
        return (
            Outcome.FAIL,
            f"{shown}, needs {needed}",
            "close other programs, or use smaller models",
        )
    if free < GOOD_FREE_MEMORY_BYTES:
        return Outcome.WARN, shown, "large search models may not fit; ViT-B-32__openai does"
    return Outcome.OK, shown, ""


def check_disk(facts: Facts) -> Answer:
    """There is room to download models."""
    shown = f"{format_bytes(facts.disk_free_bytes)} free for models"
    if facts.disk_free_bytes < MIN_FREE_DISK_BYTES and not _all_present(facts):
        return Outcome.FAIL, f"{shown}, needs {format_bytes(MIN_FREE_DISK_BYTES)}", remedies.DISK
    if facts.disk_free_bytes < GOOD_FREE_DISK_BYTES:
        return Outcome.WARN, shown, "the largest search models need up to 8 GB"
    return Outcome.OK, shown, ""


def check_models_dir(facts: Facts) -> Answer:
    """The model folder can be written."""
    if facts.models_dir_error:
        fix = f"chown or chmod {facts.settings.models_dir}, or set models_dir (ML_MODELS_DIR)"
        return Outcome.FAIL, f"{facts.settings.models_dir}: {facts.models_dir_error}", fix
    if facts.unreadable:
        fix = "chown -R or chmod -R it for the user that runs the service"
        return Outcome.FAIL, f"cannot read {'; '.join(facts.unreadable)}", fix
    return Outcome.OK, str(facts.settings.models_dir), ""


def check_state_dir(facts: Facts) -> Answer:
    """What is remembered between starts can be written."""
    folder = facts.settings.state_folder
    if facts.state_dir_error:
        told = f"{folder}: {facts.state_dir_error}; the service runs, and remembers nothing"
        return Outcome.WARN, told, f"chown or chmod {folder}, or set state_dir (ML_STATE_DIR)"
    return Outcome.OK, str(folder), ""


def check_names(facts: Facts) -> Answer:
    """Every model that is asked for is an official one: no hub has another."""
    unknown = [f"{model.name}: {model.problem}" for model in facts.models if model.is_unknown]
    if unknown:
        return Outcome.FAIL, "; ".join(unknown), remedies.NAME
    return Outcome.OK, ", ".join(model.name for model in facts.models), ""


def check_hub(facts: Facts) -> Answer:
    """Models can be fetched, or need not be."""
    if not facts.hub:
        return Outcome.OK, "reachable", ""
    if facts.hub == "offline":
        if _all_present(facts):
            return Outcome.OK, "offline by setting; all configured models are here", ""
        return Outcome.FAIL, "offline by setting, and models are missing", remedies.OFFLINE
    if _all_present(facts):
        return Outcome.WARN, f"{facts.hub}; all configured models are here", ""
    return Outcome.FAIL, facts.hub, remedies.NETWORK


def check_models(facts: Facts) -> Answer:
    """The configured models are here and whole."""
    broken = [m for m in facts.models if m.problem and not m.is_unknown]
    if broken:
        damaged = [f"{m.name} ({m.problem})" for m in broken]
        names = " ".join(m.name for m in broken)
        fix = f"immich-ml-metal models pull {names}"
        return Outcome.FAIL, f"damaged: {', '.join(damaged)}", fix
    missing = [m.name for m in facts.models if not m.is_present and not m.is_unknown]
    if missing:
        fix = f"immich-ml-metal models pull {' '.join(missing)}"
        if facts.hub:
            return Outcome.FAIL, f"not here: {', '.join(missing)}", fix
        return Outcome.WARN, f"fetched at first use: {', '.join(missing)}", fix
    return Outcome.OK, ", ".join(m.name for m in facts.models if not m.is_unknown), ""


def _all_present(facts: Facts) -> bool:
    return all(
        model.is_unknown or (model.is_present and not model.problem) for model in facts.models
    )
