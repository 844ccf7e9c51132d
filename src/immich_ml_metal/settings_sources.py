"""Where settings come from; the only reader of the environment.

Order: command line, `ML_*`, the official names, the TOML file, the default. The TOML file: the one
named by `--config`, else by `ML_CONFIG_FILE`, else the one that `config init` writes.
"""

import os
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from immich_ml_metal.errors import ConfigError
from immich_ml_metal.setting_kinds import hide_passwords
from immich_ml_metal.settings import SECRET, Settings, env_names
from immich_ml_metal.settings_environment import (
    CONFIG_VARIABLE,
    closest,
    doubtful_names,
    gather,
    official_value,
)
from immich_ml_metal.settings_text import ENVIRONMENT
from immich_ml_metal.system.network_settings import CARRIED, carried
from immich_ml_metal.system.paths import at_home, read_settings_text

DEFAULT_FILE = Path("~/.config/immich-ml-metal/config.toml")


class Resolved(NamedTuple):
    """The settings, where each came from, and what in the environment is not as it seems."""

    settings: Settings
    origin: dict[str, str]
    warnings: list[str]

    def set_names(self, *others: str) -> list[str]:
        """The settings that somebody has set, elsewhere than in these places."""
        return [name for name, by in self.origin.items() if by not in ("default", *others)]


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
        file: a TOML file with settings by name; looked for when None.
        env_file: an Immich `.env` file; the real environment wins over it.

    Raises:
        ConfigError: a name is unknown or a value is malformed; the message names it.
    """
    return resolve(overrides, environ=environ, file=file, env_file=env_file).settings


def resolve(
    overrides: Mapping[str, Any] | None = None,
    *,
    environ: Mapping[str, str] | None = None,
    file: Path | None = None,
    env_file: Path | None = None,
) -> Resolved:
    """Like `load_settings`, and also say where each value came from, by setting name."""
    env = gather(os.environ if environ is None else environ, env_file)
    file = file or settings_file(env)
    toml = _read_toml(file)
    given = {name: value for name, value in (overrides or {}).items() if value is not None}
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    warnings: list[str] = []
    for name, field in Settings.model_fields.items():
        for value, source in _candidates(name, field, given, env, toml, file):
            values[name], origin[name] = value, source
            if source in env_names(field)[1:]:
                values[name], note = official_value(source, value)
                warnings += [note] if note else []
            break
    try:
        settings = Settings(**values)
    except ValidationError as exc:
        raise ConfigError(_explain(exc, origin)) from exc
    warnings += doubtful_names(env, origin.values())
    every = {name: origin.get(name, "default") for name in Settings.model_fields}
    return Resolved(settings, every, warnings)


@contextmanager
def named_file(path: Path) -> Iterator[None]:
    """Let `path` be the settings file of this process, and of those it starts, in the body."""
    former = os.environ.get(CONFIG_VARIABLE)
    os.environ[CONFIG_VARIABLE] = str(at_home(path).absolute())
    try:
        yield
    finally:
        if former is None:
            del os.environ[CONFIG_VARIABLE]
        else:
            os.environ[CONFIG_VARIABLE] = former


@contextmanager
def variables_of_file() -> Iterator[None]:
    """In the body, this process has the variables that the settings file holds and it lacks.

    A file that cannot be read holds none; whoever reads its settings says why.
    """
    added = {}
    with suppress(ConfigError):
        added = _read_toml(settings_file()).get(ENVIRONMENT, {})
    added = {name: value for name, value in added.items() if not carried(os.environ).get(name)}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def network_variables(env_file: Path | None) -> dict[str, str]:
    """Proxies, certificates and tokens of this process and of an Immich `.env` file."""
    return carried({**gather({}, env_file), **os.environ})


def named_by_caller(env: Mapping[str, str] | None = None) -> Path | None:
    """The settings file that `--config` or the environment names."""
    named = (os.environ if env is None else env).get(CONFIG_VARIABLE)
    return at_home(Path(named)) if named else None


def settings_file(env: Mapping[str, str] | None = None) -> Path | None:
    """The settings file in force without `--config`, if there is one."""
    if (named := named_by_caller(env)) is not None:
        return named
    try:
        default = DEFAULT_FILE.expanduser()
        return default if default.exists() else None
    except (OSError, RuntimeError):  # no home folder, or one that may not be read
        return None


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
    for variable in env_names(field):
        if env.get(variable, ""):
            yield env[variable], variable
    if name in toml:
        yield toml[name], str(file)


def _read_toml(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        values = tomllib.loads(read_settings_text(path, "settings file"))
    except (tomllib.TOMLDecodeError, RecursionError) as exc:
        raise ConfigError(f"{path} is not TOML: {exc}") from exc
    for name in values:
        if name not in (known := (*Settings.model_fields, ENVIRONMENT)):
            raise ConfigError(f"unknown setting {name!r} in {path}{_hint(name, known)}")
    table = values.get(ENVIRONMENT, {})
    for name, value in (table if isinstance(table, dict) else {"": table}).items():
        if name not in CARRIED or not isinstance(value, str):
            hint = _hint(name, CARRIED) or f"; it holds texts of {', '.join(CARRIED)}"
            raise ConfigError(f"{ENVIRONMENT}.{name} in {path} is not understood{hint}")
    return values


def _hint(name: str, known: Any) -> str:
    close = closest(name, known)
    return f"; did you mean {close}?" if close else ""


def _explain(exc: ValidationError, origin: Mapping[str, str]) -> str:
    lines = []
    for error in exc.errors():
        name = str(error["loc"][0])
        reason = error["msg"].removeprefix("Value error, ")
        reason = reason[:1].lower() + reason[1:]
        value = "***" if name in SECRET else hide_passwords(repr(error["input"]))
        lines.append(f"{origin.get(name, name)} = {value}: {reason} (setting {name})")
    return "; ".join(lines)
