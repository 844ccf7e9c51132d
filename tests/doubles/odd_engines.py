"""Engines that abort, hang, throw, lie or overflow, by a scenario file beside the models.

`scenario.json` in the models' folder: candidate (`mlx float16`) → what it does, and `system`, the
macOS build that verdicts depend on. Every probe and every load is written into `journal` there.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from immich_ml_metal.backends.base import AnyModel
from immich_ml_metal.backends.makers import Maker, Surroundings
from immich_ml_metal.backends.ort.engine import OrtEngine
from immich_ml_metal.backends.selection import Platform
from immich_ml_metal.qualification.environment import Environment
from immich_ml_metal.qualification.plan import Machine
from immich_ml_metal.types import ModelFiles, ModelKey, Part

# Starts a module of the doubles as a process: they are no part of the installed package.
_RUN = (
    "import runpy, sys; sys.path.insert(0, sys.argv.pop(1)); "
    "runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
)


def command_of(module: str) -> tuple[str, ...]:
    """What runs `doubles.<module>`; arguments may follow."""
    return (sys.executable, "-c", _RUN, str(Path(__file__).parents[1]), f"doubles.{module}")


M_SERIES = Platform("Darwin", "arm64")
FORMATS = frozenset({"float16", "mixed", "float32"})


def write_scenario(models: Path, **scenario: Any) -> None:
    """Set what engines do; `mlx_float16="abort"` is about the candidate `mlx float16`."""
    told = {name.replace("_", " "): does for name, does in scenario.items()}
    (models / "scenario.new").write_text(json.dumps(told))
    (models / "scenario.new").replace(models / "scenario.json")  # engines at work read it


def read_scenario(models: Path) -> dict[str, Any]:
    path = models / "scenario.json"
    return json.loads(path.read_text()) if path.exists() else {}


def journal(models: Path, word: str) -> list[str]:
    """What happened: the rest of every line that begins with `word`."""
    path = models / "journal"
    lines = path.read_text().splitlines() if path.exists() else []
    return [line.removeprefix(f"{word} ") for line in lines if line.startswith(f"{word} ")]


def note(models: Path, line: str) -> None:
    with (models / "journal").open("a") as file:
        file.write(f"{line}\n")


class OddModel:
    """An ONNX Runtime model whose answers go through something."""

    def __init__(self, model: AnyModel, read: Callable[[], str]) -> None:
        self._model = model
        self._read = read
        self.max_batch = model.max_batch
        self.size_bytes = model.size_bytes
        self.preprocess = model.preprocess
        self.postprocess = model.postprocess
        self.close = model.close

    def infer(self, batch: Sequence[Any]) -> list[Any]:
        does = self._read()
        if does == "hang":
            time.sleep(140)
        if does == "throw":
            raise RuntimeError("[METAL] Command buffer execution failed: Insufficient Memory")
        return [self._spoil(raw, does) for raw in self._model.infer(batch)]

    def _spoil(self, raw: Any, does: str) -> Any:
        if isinstance(raw, (list, tuple)):
            return type(raw)(self._spoil(part, does) for part in raw)
        if does == "nan":
            return np.full_like(raw, np.nan)
        if does == "lie":  # turn it by the angle whose cosine is 0.99
            rng = np.random.default_rng(0)
            other = rng.standard_normal(raw.shape)
            flat, away = raw.ravel(), other.ravel()
            away = away - flat * (away @ flat) / (flat @ flat)
            away *= np.linalg.norm(flat) / np.linalg.norm(away)
            return (0.99 * flat + np.sqrt(1 - 0.99**2) * away).reshape(raw.shape).astype(raw.dtype)
        return raw


class OddEngine:
    """ONNX Runtime under another name."""

    needs_files = True
    number_formats = FORMATS

    def __init__(self, name: str, given: Surroundings) -> None:
        self.name = name
        self._models = given.settings.models_dir
        self._engine = OrtEngine(given.settings)
        self.device = self._engine.device

    def load(
        self, key: ModelKey, files: ModelFiles | None, number_format: str | None = None
    ) -> AnyModel:
        def does() -> str:
            told: str = read_scenario(self._models).get(f"{self.name} {number_format}", "right")
            # once is enough of a wait for a test
            return "right" if told == "hang" and key.part is not Part.VISUAL else told

        note(self._models, f"load {self.name} {number_format} {key}")
        if does() == "abort":
            os.abort()
        return OddModel(self._engine.load(key, files), does)


def _maker(name: str) -> Maker:
    return lambda given: OddEngine(name, given)


MAKERS: Mapping[str, Maker] = {
    "cpu": lambda given: OrtEngine(given.settings),
    "mlx": _maker("mlx"),
    "coreml": _maker("coreml"),
    "vision": _maker("vision"),
}


class OddEnvironment(Environment):
    """A Mac whose build of macOS the scenario names."""

    def __init__(self, models: Path) -> None:
        super().__init__()
        self._models = models

    def facts_for(self, engine: str) -> Mapping[str, str]:
        system = read_scenario(self._models).get("system", "macOS 25A1")
        return {**super().facts_for(engine), "system": system}


def odd_mac(models: Path) -> Machine:
    """A Mac with these engines."""
    return Machine(M_SERIES, OddEnvironment(models), MAKERS)
