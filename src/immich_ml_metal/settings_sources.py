"""Where settings come from; the only reader of the environment.

Order: command line, `ML_*`, the official names, the TOML file, the default.
"""

import difflib
import os
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from dotenv import dotenv_values
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from immich_ml_metal.errors import ConfigError
from immich_ml_metal.settings import SECRET, Settings, env_names

# The official service dropped these in v3.0; each loads both halves.
_OLD_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "MACHINE_LEARNING_PRELOAD__CLIP": "MACHINE_LEARNING_PRELOAD__CLIP__TEXTUAL and __VISUAL",
        "MACHINE_LEARNING_PRELOAD__FACIAL_RECOGNITION": (
            "MACHINE_LEARNING_PRELOAD__FACIAL_RECOGNITION__DETECTION and __RECOGNITION"
        ),
    }
)


def load_settings(
    overrides: Mapping[str, Any] | None = None,
    *,
    environ: Mapping[str, str] | None = None,
    file: Path | None = None,
    env_file: Path | None = None,
) -> Settings:
    """Read every source once and build the settings.

    Args:
        overrides: command-line values by setting name; None values count as not given.
        environ: the environment; the process's own when None.
        file: a TOML file with settings by name; `ML_CONFIG_FILE` names one too.
        env_file: an Immich `.env` file; the real environment wins over it.

    Raises:
        ConfigError: a name is unknown or a value is malformed; the message names it.
    """
    return resolve(overrides, environ=environ, file=file, env_file=env_file)[0]


def resolve(
    overrides: Mapping[str, Any] | None = None,
    *,
    environ: Mapping[str, str] | None = None,
    file: Path | None = None,
    env_file: Path | None = None,
) -> tuple[Settings, dict[str, str]]:
    """Like `load_settings`, and also say where each value came from, by setting name."""
    env = {**_read_env_file(env_file), **(os.environ if environ is None else environ)}
    if file is None and "ML_CONFIG_FILE" in env:
        file = Path(env["ML_CONFIG_FILE"])
    _refuse_unknown(env)
    toml = _read_toml(file)
    given = {name: value for name, value in (overrides or {}).items() if value is not None}
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for name, field in Settings.model_fields.items():
        for value, source in _candidates(name, field, given, env, toml, file):
            values[name], origin[name] = value, source
            break
    try:
        settings = Settings(**values)
    except ValidationError as exc:
        raise ConfigError(_explain(exc, origin)) from exc
    return settings, {name: origin.get(name, "default") for name in Settings.model_fields}


def doubtful_names(
    origin: Mapping[str, str],
    *,
    environ: Mapping[str, str] | None = None,
    env_file: Path | None = None,
) -> list[str]:
    """A sentence for each official name that is set and is old, or has no meaning here.

    Args:
        origin: where each setting came from, as `resolve` says.
        environ: as for `resolve`.
        env_file: as for `resolve`.
    """
    old = [
        f"{name} is an old name, which Immich's own service no longer reads; "
        f"set {_OLD_NAMES[name]} instead"
        for name in sorted(_OLD_NAMES.keys() & set(origin.values()))
    ]
    env = {**_read_env_file(env_file), **(os.environ if environ is None else environ)}
    known = {name for field in Settings.model_fields.values() for name in env_names(field)}
    return old + [
        f"{name} is set, but it has no meaning here and is ignored"
        for name in sorted(env)
        if name.upper().startswith("MACHINE_LEARNING_") and name.upper() not in known
    ]


def _candidates(
    name: str,
    field: FieldInfo,
    given: Mapping[str, Any],
    env: Mapping[str, str],
    toml: Mapping[str, Any],
    file: Path | None,
) -> Iterator[tuple[Any, str]]:
    if name in given:
        yield given[name], "command line"
    upper = {key.upper(): value for key, value in env.items()}
    for variable in env_names(field):
        if upper.get(variable, ""):
            yield upper[variable], variable
    if name in toml:
        yield toml[name], str(file)


def _read_env_file(path: Path | None) -> dict[str, str]:
    if path is None:
        return {}
    if not path.is_file():
        raise ConfigError(f"env file {path} does not exist")
    return {key: value for key, value in dotenv_values(path).items() if value is not None}


def _read_toml(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        values = tomllib.loads(path.expanduser().read_text(encoding="utf-8"))
    except OSError as exc:
        raise ConfigError(f"cannot read the settings file {path}: {exc.strerror}") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path} is not TOML: {exc}") from exc
    for name in values:
        if name not in Settings.model_fields:
            raise ConfigError(
                f"unknown setting {name!r} in {path}{_hint(name, Settings.model_fields)}"
            )
    return values


def _refuse_unknown(env: Mapping[str, str]) -> None:
    known = {names[0] for field in Settings.model_fields.values() if (names := env_names(field))}
    known.add("ML_CONFIG_FILE")
    for name in env:
        if name.upper().startswith("ML_") and name.upper() not in known:
            raise ConfigError(f"unknown setting {name}{_hint(name.upper(), known)}")


def _hint(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _explain(exc: ValidationError, origin: Mapping[str, str]) -> str:
    lines = []
    for error in exc.errors():
        name = str(error["loc"][0])
        reason = error["msg"][:1].lower() + error["msg"][1:]
        value = "***" if name in SECRET else repr(error["input"])
        lines.append(f"{origin.get(name, name)} = {value}: {reason} (setting {name})")
    return "; ".join(lines)
