"""The environment as people really set it: quotes, old names, the official service's values.

What Immich's own service takes does not stop our start; what is read otherwise, or not at all, is
said in a warning. Knows names and texts, not types: `settings_sources` reads values.
"""

import difflib
import io
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

from dotenv import dotenv_values

from immich_ml_metal.errors import ConfigError
from immich_ml_metal.settings import Settings, env_names
from immich_ml_metal.system.paths import read_settings_text

CONFIG_VARIABLE = "ML_CONFIG_FILE"
# Names that Immich's own service no longer reads, and what took their place.
_OLD_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "MACHINE_LEARNING_HOST": "IMMICH_HOST",
        "MACHINE_LEARNING_PORT": "IMMICH_PORT",
        "MACHINE_LEARNING_PRELOAD__CLIP": "MACHINE_LEARNING_PRELOAD__CLIP__TEXTUAL and __VISUAL",
        "MACHINE_LEARNING_PRELOAD__FACIAL_RECOGNITION": (
            "MACHINE_LEARNING_PRELOAD__FACIAL_RECOGNITION__DETECTION and __RECOGNITION"
        ),
    }
)
_TYPO = 0.85  # likeness above which an unknown name is a slip, as long as it is no longer
_QUOTES = ("'", '"')
_DAY_S = "86400"
_ON, _OFF = frozenset({"1", "ON", "YES", "TRUE"}), frozenset({"0", "OFF", "NO", "FALSE"})
_OFFICIAL_LEVELS = frozenset(
    {"critical", "error", "warning", "warn", "info", "log", "debug", "verbose"}
)


def known_names() -> frozenset[str]:
    """Every variable that a setting is read from."""
    own = {name for field in Settings.model_fields.values() for name in env_names(field)}
    return frozenset({*own, CONFIG_VARIABLE})


def gather(environ: Mapping[str, str], env_file: Path | None) -> dict[str, str]:
    """All variables by name in capitals, quotes and blanks around a value stripped.

    The real environment wins over the file.

    Raises:
        ConfigError: the file cannot be read, or a name is a slip of one of ours.
    """
    env = {**_read_env_file(env_file), **environ}
    _refuse_slips(env)
    return {name.upper(): _strip(value) for name, value in env.items()}


def _strip(value: str) -> str:
    value = value.strip()
    while len(value) > 1 and value[0] in _QUOTES and value[0] == value[-1]:
        value = value[1:-1].strip()
    return value


def _read_env_file(path: Path | None) -> dict[str, str]:
    if path is None:
        return {}
    stream = io.StringIO(read_settings_text(path, "env file"))
    return {k: v for k, v in dotenv_values(stream=stream).items() if v is not None}


def _refuse_slips(env: Mapping[str, str]) -> None:
    """A mistyped name of ours stops the start: what it was to set may be what keeps it safe."""
    for name in _unknown(env):
        close = closest(name.upper(), known_names(), _TYPO)
        if close and abs(len(close) - len(name)) <= 1:
            raise ConfigError(f"unknown setting {name}; did you mean {close}?")


def _unknown(env: Mapping[str, str]) -> list[str]:
    return [
        n for n in sorted(env) if n.upper().startswith("ML_") and n.upper() not in known_names()
    ]


def closest(name: str, known: Iterable[str], likeness: float = 0.6) -> str:
    """The known name that is most like `name`; empty when none is like it enough."""
    return next(iter(difflib.get_close_matches(name, sorted(known), n=1, cutoff=likeness)), "")


def official_value(variable: str, text: str) -> tuple[str, str]:
    """A value as Immich's own service reads it, and how that differs from what is written."""
    reading = _READINGS.get(variable)
    read = reading(text) if reading is not None else text
    return read, "" if read == text else f"{variable}={text!r} {_MEANING[variable]}"


def _at_least_0(text: str) -> str:
    return "0" if text.startswith("-") and text[1:].replace(".", "", 1).isdigit() else text


def _offline(text: str) -> str:
    if text.upper() in _ON | _OFF:
        return text
    return "0"


def _level(text: str) -> str:
    return text if text.lower() in _OFFICIAL_LEVELS else "info"


def _timeout(text: str) -> str:
    try:
        return text if float(text) > 0 else _DAY_S
    except ValueError:
        return text


_READINGS: Mapping[str, Callable[[str], str]] = MappingProxyType(
    {
        "HF_HUB_OFFLINE": _offline,
        "IMMICH_LOG_LEVEL": _level,
        "MACHINE_LEARNING_WORKER_TIMEOUT": _timeout,
        "MACHINE_LEARNING_MODEL_TTL": _at_least_0,
        "MACHINE_LEARNING_REQUEST_THREADS": _at_least_0,
        "MACHINE_LEARNING_MODEL_INTRA_OP_THREADS": _at_least_0,
    }
)
_MEANING: Mapping[str, str] = MappingProxyType(
    {
        "HF_HUB_OFFLINE": "means off, as for Hugging Face's library",
        "IMMICH_LOG_LEVEL": "means info, as for Immich's own service",
        "MACHINE_LEARNING_WORKER_TIMEOUT": "means no limit; a day is taken",
        "MACHINE_LEARNING_MODEL_TTL": "means 0: models are kept",
        "MACHINE_LEARNING_REQUEST_THREADS": "means 0: one per core",
        "MACHINE_LEARNING_MODEL_INTRA_OP_THREADS": "means 0: one per core",
    }
)


def doubtful_names(env: Mapping[str, str], used: Iterable[str]) -> list[str]:
    """A sentence for each variable that is old, or has no meaning here.

    Args:
        env: all variables, by name in capitals.
        used: those that a setting was read from.
    """
    old = [
        f"{name} is an old name, which Immich's own service no longer reads; "
        f"set {_OLD_NAMES[name]} instead"
        for name in sorted(_OLD_NAMES.keys() & set(used))
    ]
    known = known_names()
    official = [
        f"{name} is set, but it has no meaning here and is ignored"
        for name in sorted(env)
        if name.startswith("MACHINE_LEARNING_") and name not in known
    ]
    others = _unknown(env)
    if others:
        hints = {name: closest(name, known, 0.75) for name in others}
        told = [f"{n} (did you mean {hint}?)" if hint else n for n, hint in hints.items()]
        official.append(f"not settings of this project, ignored: {', '.join(told)}")
    return old + official
