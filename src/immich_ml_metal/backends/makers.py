"""Makes engines by name. Only the module of the engine that is made gets imported."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from immich_ml_metal.backends.base import Engine
from immich_ml_metal.errors import ConfigError
from immich_ml_metal.settings import Settings
from immich_ml_metal.types import ModelFiles, ModelKey

FilesOf = Callable[[ModelKey], ModelFiles]


def _no_files(key: ModelKey) -> ModelFiles:
    raise ConfigError(f"no model store was given to fetch {key} from")


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What an engine is made with.

    Attributes:
        settings: how it is to work.
        files_of: finds (or fetches) an official model's files, for what Apple Vision cannot answer.
        on_fallback: is told the reason each time something runs elsewhere than planned.
        is_explicit: it was asked for by name: then a refusal is an error, not a fallback.
    """

    settings: Settings
    files_of: FilesOf = _no_files
    on_fallback: Callable[[str], None] = field(default=lambda reason: None)
    is_explicit: bool = False


Maker = Callable[[Surroundings], Engine]


def _class(module: str, name: str) -> Any:
    """Import a maker from a sibling only now: its module loads a hardware library."""
    return getattr(importlib.import_module(f"immich_ml_metal.backends.{module}"), name)


def _make_coreml(given: Surroundings) -> Engine:
    make = _class("coreml.engine", "create_coreml")
    engine: Engine = make(
        given.settings, is_explicit=given.is_explicit, on_fallback=given.on_fallback
    )
    return engine


def _make_vision(given: Surroundings) -> Engine:
    make = _class("vision.setup", "create_vision")
    engine: Engine = make(given.settings, files_of=given.files_of, on_fallback=given.on_fallback)
    return engine


MAKERS: Mapping[str, Maker] = MappingProxyType(
    {
        "cpu": lambda given: _class("ort.engine", "OrtEngine")(given.settings),
        "mlx": lambda given: _class("mlx", "MlxEngine")(given.settings),
        "coreml": _make_coreml,
        "vision": _make_vision,
        "open_clip": lambda given: _class("open_clip", "create_open_clip")(given.settings),
    }
)
