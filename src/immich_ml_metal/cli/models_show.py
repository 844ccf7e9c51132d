"""The tables and JSON of `models list|verify|import|info|recommend`."""

import json
from collections.abc import Sequence
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from immich_ml_metal.advice import Advice, memory_bytes
from immich_ml_metal.catalog import MULTILINGUAL, ModelSpec
from immich_ml_metal.config import Settings
from immich_ml_metal.model_import import Imported
from immich_ml_metal.progress import format_bytes
from immich_ml_metal.shelf import PartStatus, State
from immich_ml_metal.types import Task

_STYLE = {
    State.VERIFIED: "green",
    State.UNVERIFIED: "yellow",
    State.DAMAGED: "red",
    State.MISSING: "dim",
}
_MANY = 4  # languages named one by one; more are counted


def print_list(rows: Sequence[tuple[ModelSpec, list[PartStatus]]], *, as_json: bool) -> None:
    """The catalogue with what is on disk."""
    if as_json:
        _print_json([_row(spec, statuses) for spec, statuses in rows])
        return
    table = Table("model", "family", "dim", "size", "languages", "licence", "here", box=None)
    for spec, statuses in rows:
        table.add_row(
            spec.name,
            spec.family,
            str(spec.dim or "-"),
            format_bytes(spec.size_bytes),
            _languages(spec),
            spec.licence,
            _here(statuses),
        )
    Console().print(table)


def print_verified(statuses: Sequence[PartStatus], *, as_json: bool) -> None:
    """What checking found, file by file where something is wrong."""
    if as_json:
        _print_json([_status(status) for status in statuses])
        return
    console = Console()
    for status in statuses:
        size = format_bytes(status.size_bytes)
        console.print(f"{_styled(status.state)}  {status.key}  {size}", soft_wrap=True)
        for path, state in status.files.items():
            if state in (State.DAMAGED, State.MISSING) and status.elsewhere is None:
                console.print(f"    {path} is {state}", soft_wrap=True)
    if not statuses:
        console.print("No model is on disk.")


def print_imported(done: Sequence[Imported], *, as_json: bool) -> None:
    """What became of each half that was found."""
    rows = [
        {
            "model": half.found.key.name,
            "part": half.found.key.part,
            "revision": half.found.revision,
            "outcome": half.outcome,
            "reason": half.reason,
        }
        for half in done
    ]
    if as_json:
        _print_json(rows)
        return
    for half in done:
        reason = f": {half.reason}" if half.reason else ""
        typer.echo(f"{half.outcome:9} {half.found.key}{reason}")


def print_info(
    spec: ModelSpec, statuses: Sequence[PartStatus], settings: Settings, *, as_json: bool
) -> None:
    """One model, with what changing to it means."""
    row = _row(spec, statuses)
    row["memory_bytes"] = memory_bytes(spec)
    row["changing"] = what_changing_means(spec, settings)
    if as_json:
        _print_json(row)
        return
    table = Table(show_header=False, box=None)
    for label, value in _facts(spec, statuses).items():
        table.add_row(f"[bold]{label}[/]", value)
    console = Console()
    console.print(table)
    console.print(row["changing"])


def print_advice(advice: Sequence[Advice], memory_total_bytes: int, *, as_json: bool) -> None:
    """The recommended models and why."""
    if as_json:
        _print_json([{"model": item.spec.name, "reason": item.reason} for item in advice])
        return
    typer.echo(f"For this machine with {format_bytes(memory_total_bytes)} of memory:")
    for item in advice:
        typer.echo(f"  {item.spec.name}: {item.reason} (licence {item.spec.licence})")
    names = " ".join(item.spec.name for item in advice)
    typer.echo(f"Fetch them with: immich-ml-metal models pull {names}")
    typer.echo("Then choose them in Immich: Administration, Settings, Machine Learning.")


def what_changing_means(spec: ModelSpec, settings: Settings) -> str:
    """What a user has to do in Immich after choosing this model."""
    if spec.task is Task.OCR:
        return "Changing the text model: run the text recognition job for all assets."
    if spec.task is Task.FACES:
        return (
            "Changing the face model: run face detection and facial recognition for all assets; "
            "vectors of two face models cannot be compared, although both have 512 numbers."
        )
    if spec.name == settings.clip_model:
        return f"This is the configured search model; its vectors have {spec.dim} numbers."
    return (
        f"Changing the search model: its vectors have {spec.dim} numbers. Immich rebuilds the "
        "search index, and smart search must be run for all assets; until then search finds only "
        "what has been done. Vectors of two models cannot be compared, even of equal length."
    )


def _facts(spec: ModelSpec, statuses: Sequence[PartStatus]) -> dict[str, str]:
    parts = ", ".join(f"{part} {format_bytes(size)}" for part, size in spec.part_bytes.items())
    memory = ", ".join(f"{engine} {format_bytes(n)}" for engine, n in memory_bytes(spec).items())
    facts = {
        "model": spec.name,
        "family": f"{spec.family} ({spec.task})",
        "on disk": _here(statuses),
        "size": f"about {parts}",
        "memory": f"about {memory}, for the weights",
        "vector": f"{spec.dim} numbers" if spec.dim else "none",
        "input": f"{spec.input_px} px, {spec.resize_mode or 'letterbox'}" if spec.input_px else "",
        "tokenizer": f"{spec.tokenizer}, {spec.context_length} tokens" if spec.tokenizer else "",
        "languages": ", ".join(spec.languages),
        "licence": spec.licence,
    }
    return {label: value for label, value in facts.items() if value}


def _row(spec: ModelSpec, statuses: Sequence[PartStatus]) -> dict[str, Any]:
    return {
        "name": spec.name,
        "family": spec.family,
        "task": spec.task,
        "dim": spec.dim,
        "size_bytes": spec.size_bytes,
        "languages": list(spec.languages),
        "licence": spec.licence,
        "parts": [_status(status) for status in statuses],
    }


def _status(status: PartStatus) -> dict[str, Any]:
    return {
        "model": status.key.name,
        "part": status.key.part,
        "state": status.state,
        "usable": status.is_usable,
        "served_from_elsewhere": status.elsewhere is not None,
        "size_bytes": status.size_bytes,
        "files": dict(status.files),
    }


def _here(statuses: Sequence[PartStatus]) -> str:
    if all(status.state is State.MISSING and not status.size_bytes for status in statuses):
        return "[dim]-[/]"
    if all(status.elsewhere is not None for status in statuses):
        return "[green]in the rapidocr wheel[/]"
    if len({status.state for status in statuses}) == 1:
        return _styled(statuses[0].state)
    return ", ".join(f"{status.key.part} {_styled(status.state)}" for status in statuses)


def _styled(state: State) -> str:
    return f"[{_STYLE[state]}]{state}[/]"


def _languages(spec: ModelSpec) -> str:
    if MULTILINGUAL in spec.languages:
        return "about 100 or more"
    if len(spec.languages) > _MANY:
        return f"{len(spec.languages)} languages"
    return " ".join(spec.languages) or "-"


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))
