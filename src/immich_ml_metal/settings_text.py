"""A settings file as text: written whole with every setting explained, or changed in place.

A file that a person has written keeps its comments, its order and its line ends: only the values
that change are others. Knows nothing of where values come from.
"""

import json
import tomllib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

from immich_ml_metal.errors import ConfigError
from immich_ml_metal.setting_kinds import hide_passwords
from immich_ml_metal.settings import SECRET, Settings, env_names
from immich_ml_metal.system.network_settings import TOKENS

# The table of the file that holds variables of the environment, by name.
ENVIRONMENT = "environment"
_UNITS = {"_s": "seconds", "_bytes": "bytes", "_px": "pixels", "_pixels": "pixels"}


def render(settings: Settings, set_names: Iterable[str]) -> str:
    """A file with every setting explained; those that are named are in force, others defaults."""
    blocks = ["# Settings of immich-ml-metal. A line that starts with '#' is the default."]
    in_force = frozenset(set_names)
    for name, field in Settings.model_fields.items():
        head = f"# {field.description}"
        unit = next((unit for end, unit in _UNITS.items() if name.endswith(end)), None)
        about = [f"unit: {unit}"] if unit else []
        about.append("environment: " + ", ".join(env_names(field)))
        value = toml_value(getattr(settings, name))
        line = f"{name} = {value}" if value is not None else f'{name} = ""  # not set'
        blocks.append(f"{head}\n# {'; '.join(about)}\n{'' if name in in_force else '# '}{line}")
    return "\n\n".join(blocks) + "\n"


def toml_value(value: Any) -> str | None:
    """One value in TOML; None when there is none. A JSON string is a TOML string but for DEL."""
    if value is None:
        return None
    if hasattr(value, "get_secret_value"):
        value = value.get_secret_value()
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    if isinstance(value, tuple):
        return "[" + ", ".join(filter(None, map(toml_value, value))) + "]"
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")


def merge(text: str, values: Mapping[str, Any], environment: Mapping[str, str]) -> str:
    """The same file with these settings, and these variables in its table `environment`.

    Raises:
        ConfigError: it is written so that a value cannot be put in without disturbing others.
    """
    top, table = _parts(text if text.endswith("\n") or not text else f"{text}\n")
    top = _put(top, values)
    if environment:
        table = _put(table or [f"\n[{ENVIRONMENT}]\n"], environment)
    merged = "".join(top + table)
    wanted = tomllib.loads(text)
    wanted |= tomllib.loads("".join(_put([], values)))
    if environment:
        wanted[ENVIRONMENT] = {**wanted.get(ENVIRONMENT, {}), **environment}
    with suppress(tomllib.TOMLDecodeError):
        if tomllib.loads(merged) == wanted:
            return merged
    raise ConfigError(f"the settings file cannot be added to: write [{ENVIRONMENT}] as a table")


def shown(text: str) -> str:
    """What a file sets, one line each; keys, tokens and passwords are blotted out."""
    values = tomllib.loads(text)
    environment = values.pop(ENVIRONMENT, {})
    lines = [
        f"{name} = {'***' if name in SECRET else hide_passwords(str(_written(value)))}"
        for name, value in values.items()
    ]
    lines += [f"[{ENVIRONMENT}]"] if environment else []
    for name, value in environment.items():
        address = value if "://" in value or "@" not in value else f"http://{value}"
        lines.append(f'{name} = "{"***" if name in TOKENS else hide_passwords(address)}"')
    return "\n".join(lines)


def _written(value: Any) -> str | None:
    return toml_value(tuple(value) if isinstance(value, list) else value)


def _parts(text: str) -> tuple[list[str], list[str]]:
    """Its statements, those before the first table and the others; comments count as such."""
    statements, held = [""], ""
    for line in text.splitlines(keepends=True):
        held += line
        with suppress(tomllib.TOMLDecodeError):  # a value that goes on in the next line
            tomllib.loads(held)
            statements.append(held)
            held = ""
    first = next((i for i, one in enumerate(statements) if one.lstrip()[:1] == "["), None)
    return statements[:first], statements[first:] if first is not None else []


def _put(statements: list[str], values: Mapping[str, Any]) -> list[str]:
    """These with the values: each in its old place, else below its default, else at the end."""
    done, left = [], {name: value for name, value in values.items() if value is not None}
    for statement in statements:
        name = next(iter(tomllib.loads(statement)), "")
        if name in left:
            line = f"{name} = {toml_value(left.pop(name))}"
            done.append(f"{line}{_comment(statement)}\n")
        else:
            done.append(statement)
    for name, value in left.items():
        default = (i for i, one in enumerate(done) if one.startswith(f"# {name} ="))
        done.insert(next(default, len(done) - 1) + 1, f"{name} = {toml_value(value)}\n")
    return done


def _comment(statement: str) -> str:
    """What stands behind a value in its line."""
    for at, letter in enumerate(statement):
        if letter == "#":
            with suppress(tomllib.TOMLDecodeError):
                tomllib.loads(statement[:at])
                return f"  {statement[at:].rstrip()}"
    return ""
