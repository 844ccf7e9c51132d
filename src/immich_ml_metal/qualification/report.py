"""The comparison as a page to post. What its reasons tell of the owner, who writes it takes out."""

import platform
from collections.abc import Sequence

import psutil

from immich_ml_metal import __version__
from immich_ml_metal.qualification.comparison import Compared
from immich_ml_metal.qualification.environment import Environment
from immich_ml_metal.qualification.verdict import Judged
from immich_ml_metal.setting_kinds import format_bytes

_HEAD = ("engine", "numbers", "cosine", "first s", "ms alone", "ms in batch", "MB", "verdict")


def render_report(environment: Environment, found: Sequence[Compared]) -> str:
    """The machine, then a table for each half of a model."""
    known = {**environment.facts_for("mlx"), **environment.facts_for("coreml")}
    versions = ", ".join(
        f"{name} {known[name]}" for name in ("mlx", "onnxruntime") if known.get(name)
    )
    memory = format_bytes(psutil.virtual_memory().total)
    lines = [
        f"# Engines measured by immich-ml-metal {__version__}",
        "",
        f"{known['chip']}, {memory}, {known['system']}, Python "
        f"{platform.python_version()}, {versions}",
    ]
    for compared in found:
        lines += ["", f"## {compared.key}", "", _row(_HEAD), _row(["---"] * len(_HEAD))]
        lines += [_row(cells(row.judged)) for row in compared.rows]
        lines += ["", f"Chosen: {compared.choice.candidate}, {compared.choice.reason}."]
    return "\n".join(lines) + "\n"


def cells(judged: Judged) -> tuple[str, ...]:
    """One candidate as a row of a table, in the order engine, numbers, figures, verdict."""
    figures, candidate = judged.verdict.figures, judged.candidate
    batch = f"{figures.batch_ms:.1f} of {figures.batch}" if figures.batch_ms is not None else "-"
    return (
        candidate.engine,
        candidate.number_format,
        _number(figures.cosine, ".7f"),
        _number(figures.first_s, ".2f"),
        _number(figures.alone_ms, ".1f"),
        batch,
        _number(None if figures.memory_bytes is None else figures.memory_bytes / 1e6, ".0f"),
        str(judged.verdict),
    )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _row(texts: Sequence[str]) -> str:
    told = (" ".join(text.replace("|", r"\|").split()) for text in texts)
    return f"| {' | '.join(told)} |"
