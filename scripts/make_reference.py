"""Write `docs/reference.md` from the code: settings, commands, statuses, metrics.

A test fails while the committed page differs from what this writes: `make reference` mends it.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from prometheus_client.metrics_core import Metric
from pydantic.fields import FieldInfo

from immich_ml_metal import errors
from immich_ml_metal.cli import COMMANDS, load_command
from immich_ml_metal.cli.output import Exit
from immich_ml_metal.metrics import Metrics, Process
from immich_ml_metal.settings import SECRET, Settings, env_names

PAGE = Path(__file__).parents[1] / "docs" / "reference.md"
HEAD = """\
# Reference

Written by `make reference` from the code, and held to it by a test: change the code, not this page.

- [Settings](#settings) · [Commands](#commands) · [Exit codes](#exit-codes) ·
  [Statuses](#statuses) · [Metrics](#metrics)
"""
UNITS = {"_s": "seconds", "_px": "pixels", "_pixels": "pixels"}
Row = tuple[str, ...]


def main() -> None:
    """Write the page."""
    PAGE.write_text(render(), encoding="utf-8")


def render() -> str:
    """The whole page."""
    parts = (HEAD, _settings(), _commands(), _exits(), _statuses(), _metrics())
    return "\n".join(parts)


def table(head: Row, rows: Sequence[Row]) -> str:
    """A Markdown table; bars inside cells are escaped."""
    lines = [head, ("---",) * len(head), *rows]
    cells = (" | ".join(cell.replace("|", "\\|") for cell in line) for line in lines)
    return "\n".join(f"| {line} |" for line in cells) + "\n"


def code(*words: str) -> str:
    """Words in code style, with commas between."""
    return ", ".join(f"`{word}`" for word in words)


# -- settings --------------------------------------------------------------------------------------


def _settings() -> str:
    rows = [
        (code(name), code(*env_names(field)), _default(name, field), _meaning(name, field))
        for name, field in Settings.model_fields.items()
    ]
    return (
        "## Settings\n\n"
        "The first column is the name in the TOML file, the second the environment variables, the "
        "project's own first. A size is a number of bytes or `64MB`, `1.5GiB`; a list has commas. "
        "`ML_CONFIG_FILE` names the TOML file.\n\n"
    ) + table(("setting", "variables", "default", "meaning"), rows)


def _default(name: str, field: FieldInfo) -> str:
    value = field.default
    if isinstance(value, tuple) and value:  # as it is written in the environment
        value = ",".join(map(str, value))
    if value is None or value == ():
        return "unset"
    if isinstance(value, bool):
        return code(str(value).lower())
    if name.endswith("_bytes") and isinstance(value, int) and value:
        return code(f"{value // 2**20}MB")
    return code(f"{value:g}" if isinstance(value, float) else str(value))


def _meaning(name: str, field: FieldInfo) -> str:
    text = field.description or ""
    unit = next((unit for end, unit in UNITS.items() if name.endswith(end)), None)
    if unit and unit not in text.lower():
        text += f" In {unit}."
    choices = _choices(field.annotation)
    if choices and not all(choice in text for choice in choices):
        text += f" One of {code(*choices)}."
    if name in SECRET:
        text += " Secret."
    return text


def _choices(annotation: Any) -> list[str]:
    if get_origin(annotation) is Literal:
        return [str(choice) for choice in get_args(annotation)]
    return []


# -- commands --------------------------------------------------------------------------------------


def _commands() -> str:
    parts = ["## Commands\n"]
    for name, command in commands().items():
        parts += [f"### {name}\n", f"{(command.help or '').strip()}\n"]
        rows = [_option(param) for param in command.params if not getattr(param, "hidden", False)]
        if rows:
            parts.append(table(("argument, option", "default", "meaning"), rows))
    return "\n".join(parts)


def commands() -> dict[str, Any]:
    """Every command by its full name, in the order of the help."""
    found: dict[str, Any] = {}
    for name in COMMANDS:
        found |= walk(load_command(name), ("immich-ml-metal", name))
    return found


def walk(command: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """Each command with its full name; groups give their commands."""
    if not hasattr(command, "commands"):
        yield " ".join(path), command
        return
    for name, inner in command.commands.items():
        if not inner.hidden:
            yield from walk(inner, (*path, name))


def _option(param: Any) -> Row:
    is_argument = param.param_type_name == "argument"
    names = [param.name.upper()] if is_argument else [*param.opts, *param.secondary_opts]
    default = param.default
    if default is None or callable(default) or default in ((), [], False):
        shown = "needed" if param.required else ""
    else:
        shown = code(str(default).lower() if default is True else str(default))
    return code(*names), shown, (param.help or "").strip()


# -- exit codes, statuses, metrics -----------------------------------------------------------------


def _exits() -> str:
    rows = [(code(str(int(exit_code))), exit_code.name.lower()) for exit_code in Exit]
    return "## Exit codes\n\nExplained in [operate](operate.md#exit-codes).\n\n" + table(
        ("code", "name"), rows
    )


def _statuses() -> str:
    rows = [
        (code(str(status)), code(kind.__name__), first_line(kind))
        for kind, status in sorted(
            errors.STATUS.items(), key=lambda pair: (pair[1], pair[0].__name__)
        )
    ]
    return (
        "## Statuses\n\nWhat a failed `/predict` answers; the reason is in the JSON field "
        "`detail`. Anything unforeseen is 500. Before `/predict` is looked at, a foreign "
        "`Origin` gets 403 and a wrong method 405. Which of these the gateway waits out instead "
        "is in [its page](gateway.md#what-it-promises).\n\n"
    ) + table(("status", "error", "meaning"), rows)


def first_line(kind: type[errors.ServiceError]) -> str:
    """An error's meaning, from its docstring."""
    return (kind.__doc__ or "").strip().splitlines()[0]


def _metrics() -> str:
    shown = {process: families(process) for process in get_args(Process)}
    rows = []
    for name, (family, labels) in sorted(families(None).items()):
        processes = [process for process, known in shown.items() if name in known]
        about = (family.type, code(*labels), " and ".join(processes), family.documentation)
        rows.append((code(name), *about))
    return "## Metrics\n\nMore in [metrics](metrics.md).\n\n" + table(
        ("series", "type", "labels", "counted in the", "meaning"), rows
    )


def families(process: Process | None) -> dict[str, tuple[Metric, Row]]:
    """What a process shows at `/metrics`, with its labels, by the name of the series."""
    found = {}
    for collector in set(Metrics(process).registry._collector_to_names):
        for family in collector.collect():
            name = f"{family.name}_total" if family.type == "counter" else family.name
            found[name] = (family, tuple(getattr(collector, "_labelnames", ())))
    return found


if __name__ == "__main__":
    main()
