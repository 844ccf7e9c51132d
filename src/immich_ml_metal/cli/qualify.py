"""`qualify`: measure every engine with the models that are here, and choose by it."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from immich_ml_metal.backends.makers import MAKERS
from immich_ml_metal.catalog import OPEN_CLIP_PREFIX, find_by_name
from immich_ml_metal.cli.output import (
    Exit,
    FolderOption,
    JsonOption,
    make_table,
    print_error,
    print_json,
)
from immich_ml_metal.doctor.share import anonymise, known_private
from immich_ml_metal.models.store import ModelStore
from immich_ml_metal.qualification.children import measure
from immich_ml_metal.qualification.comparison import Compared, Comparison
from immich_ml_metal.qualification.plan import Choices, remembered_choices
from immich_ml_metal.qualification.record import name_of
from immich_ml_metal.qualification.report import cells, render_report
from immich_ml_metal.settings_sources import load_settings
from immich_ml_metal.system.owner import write_whole
from immich_ml_metal.types import ModelKey

Names = Annotated[
    list[str] | None, typer.Argument(help="Models; those of the settings when none is named.")
]
AgainOption = Annotated[bool, typer.Option("--again", help="Measure what is known already, too.")]
ShareOption = Annotated[
    Path | None, typer.Option("--share", help="Write a report without anything private.")
]
EngineOption = Annotated[
    list[str] | None,
    typer.Option("--engine", help="Also compare this engine in all its formats: mlx, coreml."),
]


def qualify(
    names: Names = None,
    again: AgainOption = False,
    engine: EngineOption = None,
    share: ShareOption = None,
    models_dir: FolderOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure every engine on this machine and choose the fastest that is right.

    Takes minutes and the whole machine. Exit code: 0, or 1 when nothing could be measured.
    """
    settings = load_settings({"models_dir": models_dir})
    choices = remembered_choices(settings, ModelStore(settings))
    comparison = Comparison(choices, measure, engines=engine or (), again=again)
    keys = _keys(choices, names or ())
    found = asyncio.run(_compare(comparison, keys))
    if share is not None:
        write_whole(share, _report(choices, found).encode())
        typer.echo(f"Wrote {share}; look into it before you post it.", err=True)
    if as_json:
        print_json([_as_dict(one) for one in found])
    else:
        _print(found)
    if choices.record.trouble:
        print_error(f"the verdicts are not remembered: {choices.record.trouble}")
    raise typer.Exit(Exit.OK if found and not choices.record.trouble else Exit.FINDING)


def _keys(choices: Choices, names: Sequence[str]) -> list[ModelKey]:
    """Every half of these models, or of those of the settings, once."""
    found = [spec.key(part) for spec in map(find_by_name, names) for part in spec.parts]
    keys = dict.fromkeys(found or choices.configured().values())
    return [key for key in keys if not key.name.startswith(OPEN_CLIP_PREFIX)]  # nothing to compare


async def _compare(comparison: Comparison, keys: Sequence[ModelKey]) -> list[Compared]:
    """With a bar on standard error: a step for each candidate of each half."""
    found = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True
    ) as bars:
        total = sum(len(comparison.candidates(key)) for key in keys)
        bar = bars.add_task("", total=total)
        done = 0
        for key in keys:
            steps = iter(range(done + 1, total + 1))

            def on_step(candidate: object, key: ModelKey = key, steps: Any = steps) -> None:
                step = next(steps) - 1
                bars.update(bar, description=f"{key} on {candidate}", completed=step)

            compared = await comparison.compare(key, on_step)
            done += len(comparison.candidates(key))
            bars.update(bar, completed=done)
            if compared is None:
                bars.console.print(f"{key} is not here: immich-ml-metal models pull {key.name}")
            else:
                found.append(compared)
    return found


def _report(choices: Choices, found: Sequence[Compared]) -> str:
    """Markdown without anything private: a reason may be an exception's text, with its paths."""
    environment = choices.machine.environment
    facts = [environment.facts_for(engine) for engine in MAKERS]
    known = known_private(choices.settings)
    keep = frozenset(value for one in facts for value in one.values())
    return anonymise(render_report(environment, found), known, keep)


def _print(found: Sequence[Compared]) -> None:
    console = Console()
    columns = ("model", "engine", "numbers", "cosine", "first s", "ms alone", "ms in batch", "MB")
    table = make_table(*columns, "verdict", whole=columns)
    for compared in found:
        for row in compared.rows:
            is_chosen = row.judged.candidate == compared.choice.candidate
            table.add_row(str(row.key), *cells(row.judged), style="bold" if is_chosen else "")
    if not console.is_terminal:
        console = Console(width=200)
    console.print(table)
    for compared in found:
        choice = compared.choice
        console.print(f"{compared.key}: {choice.candidate} ({choice.reason})", highlight=False)
        if choice.warning:
            console.print(f"  {choice.warning}", style="yellow", highlight=False)
    console.print("A running service takes this up when its worker starts next.")


def _as_dict(compared: Compared) -> dict[str, Any]:
    return {
        "model": name_of(compared.key),
        "chosen": str(compared.choice.candidate),
        "reason": compared.choice.reason,
        "candidates": {
            str(row.judged.candidate): row.judged.verdict.as_dict() for row in compared.rows
        },
    }
