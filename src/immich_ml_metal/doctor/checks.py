"""The checks in the order of cause and effect: what comes earlier explains what comes later."""

from immich_ml_metal.doctor import machine_checks as machine
from immich_ml_metal.doctor import service_checks as service
from immich_ml_metal.doctor.result import Check

_BASE = ("architecture", "system", "python", "packages", "settings")

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
    Check("hub", machine.check_hub, after=("clock",)),
    Check("models", machine.check_models, after=("settings", "model folder", "disk", "hub")),
    Check("port", service.check_port, after=("settings",)),
    Check("version", service.check_version),
    Check(
        "engines",
        service.check_engines,
        after=(*_BASE, "memory", "model folder", "disk", "hub", "models", "port", "version"),
    ),
    Check("start at boot", service.check_service, after=(*_BASE, "port")),
    Check("address", service.check_address),
    Check("immich", service.check_immich, after=("settings", "port")),
    Check("sleep", service.check_sleep),
    Check("logs", service.check_logs),
)
