"""What a verdict depends on beside the model: chip, system, versions, our compiler, settings.

Cheap enough for a start: reads versions and small files, imports no library.
"""

import functools
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import immich_ml_metal
from immich_ml_metal.onnx_files.derived import source_digest
from immich_ml_metal.settings import Settings
from immich_ml_metal.system.programs import RunProgram, run_program
from immich_ml_metal.system.switches import exactness

Facts = Mapping[str, str]

# The packages that each engine computes with, and our own source that shapes its graphs.
_PACKAGES: Mapping[str, tuple[str, ...]] = {
    "cpu": ("onnxruntime",),
    "mlx": ("mlx",),
    "coreml": ("onnxruntime",),
    "vision": ("pyobjc-framework-Vision",),
}
_SOURCES: Mapping[str, tuple[str, ...]] = {
    "cpu": ("backends/ort",),
    "mlx": ("onnx_mlx", "onnx_graph"),
    "coreml": ("backends/coreml", "onnx_graph"),
    "vision": ("backends/vision",),
}
# The settings that change an engine's numbers or its graph; number formats are candidates.
_SETTINGS: Mapping[str, tuple[str, ...]] = {
    "mlx": ("graph_rewriting",),
    "coreml": ("use_ane", "graph_rewriting"),
    "vision": ("ocr_language_correction",),
}


class Environment:
    """This machine and this installation, as far as verdicts depend on them."""

    def __init__(self, run: RunProgram = run_program) -> None:
        self._run = run

    def facts_for(self, engine: str) -> Facts:
        """What an engine's numbers depend on, by name; equal facts mean equal numbers."""
        packages = {name: _version(name) for name in _PACKAGES.get(engine, ())}
        source = _source(*_SOURCES.get(engine, ()))
        switches = exactness() if engine == "mlx" else {}
        return {"chip": self._chip, "system": self._system, **packages, **switches} | {
            "compiler": source
        }

    @functools.cached_property
    def _chip(self) -> str:
        if platform.system() != "Darwin":
            return platform.machine()
        return self._run("sysctl", "-n", "machdep.cpu.brand_string").out.strip() or "unknown"

    @functools.cached_property
    def _system(self) -> str:
        """On macOS with its build: numbers may change with any of them."""
        if platform.system() != "Darwin":
            return platform.system()
        return f"macOS {self._run('sw_vers', '-buildVersion').out.strip() or 'unknown'}"


def settings_facts(engine: str, settings: Settings) -> Facts:
    """The settings that an engine's numbers depend on, as they are now."""
    told = {name: getattr(settings, name) for name in _SETTINGS.get(engine, ())}
    return {
        name: ",".join(sorted(value)) if isinstance(value, tuple) else str(value)
        for name, value in told.items()
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


@functools.cache
def _source(*folders: str) -> str:
    root = Path(immich_ml_metal.__file__).parent
    return source_digest(*(root / folder for folder in folders))


def changes(old: Facts, new: Facts) -> str:
    """What differs between the facts of a verdict and those of now: `mlx 0.32.4 -> 0.33.0`."""
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return ", ".join(f"{name} {old.get(name, '?')} -> {new.get(name, '?')}" for name in names)
