"""What the `models` commands print: a table or lines for people, or rows as JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from immich_ml_metal.catalog import MULTILINGUAL, ModelSpec
from immich_ml_metal.cli.output import make_table, print_json
from immich_ml_metal.errors import ModelError
from immich_ml_metal.index_guard.guard import IndexFinding
from immich_ml_metal.models.advice import LIMITED, Recommendation, memory_bytes
from immich_ml_metal.models.importing import Imported
from immich_ml_metal.models.manifest import FileRecord
from immich_ml_metal.models.prune import Waste
from immich_ml_metal.models.shelf import FileState, PartStatus
from immich_ml_metal.qualification.plan import Choices
from immich_ml_metal.setting_kinds import format_bytes
from immich_ml_metal.settings import Settings
from immich_ml_metal.types import ModelKey, Task

_STYLE = {
    FileState.VERIFIED: "green",
    FileState.UNVERIFIED: "yellow",
    FileState.DAMAGED: "red",
    FileState.UNREADABLE: "red",
    FileState.MISSING: "dim",
}
_IN_ORDER = (FileState.VERIFIED, FileState.UNVERIFIED)
_COLUMNS = ("model", "family", "dim", "size", "languages", "licence", "engine", "here")
_NARROW_COLUMNS = ("model", "dim", "size", "here")
_WIDEST = 1000  # characters; more than any row has
_MOST_FILES = 12  # M-CLIP has some 390
_MANY = 4  # languages named one by one; more are counted


def print_list(
    rows: Sequence[tuple[ModelSpec, list[PartStatus]]], choices: Choices, *, as_json: bool
) -> None:
    """The catalogue with what is on disk, and the engine that the settings mean for each."""
    if as_json:
        engines = [{"engines": _engines(spec, choices)} for spec, _ in rows]
        models = [describe_model(spec, statuses) for spec, statuses in rows]
        print_json([model | one for model, one in zip(models, engines, strict=True)])
        return
    cells = [
        _cells(spec, statuses)
        | {"engine": ", ".join(dict.fromkeys(_engines(spec, choices).values()))}
        for spec, statuses in rows
    ]
    console = Console()
    table = _table(_COLUMNS, cells)
    width = console.measure(table, options=console.options.update(width=_WIDEST)).maximum
    if not console.is_terminal:  # a file or a pipe has no width
        console = Console(width=width)
    is_narrow = width > console.width
    console.print(_table(_NARROW_COLUMNS, cells) if is_narrow else table)
    if is_narrow:
        console.print("A wider window, or --json, shows family, languages, licence and engine.")


def print_verified(statuses: Sequence[PartStatus], *, as_json: bool) -> None:
    """What checking found, file by file where something is wrong."""
    if as_json:
        print_json([_status(status) for status in statuses])
        return
    console = Console()
    for status in statuses:
        size = format_bytes(status.size_bytes)
        console.print(f"{_styled(status.state)}  {status.key}  {size}", soft_wrap=True)
        for path, state in status.files.items():
            if state not in _IN_ORDER and status.elsewhere is None:
                console.print(f"    {path} is {state}", soft_wrap=True)
    if not statuses:
        console.print("No model is on disk.")


def print_pulled(statuses: Sequence[PartStatus], failures: Mapping[ModelKey, ModelError]) -> None:
    """What is here of each half that was asked for, and why it is not, as JSON."""
    errors = {key: str(failure) for key, failure in failures.items()}
    print_json([{**_status(status), "error": errors.get(status.key)} for status in statuses])


def print_waste(found: Sequence[Waste]) -> None:
    """What is about to go, one line each."""
    if not found:
        typer.echo("Nothing to delete.")
    for waste in found:
        typer.echo(f"{format_bytes(waste.size_bytes):>8}  {waste.path}  ({waste.reason})")


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
        print_json(rows)
        return
    for half in done:
        reason = f": {half.reason}" if half.reason else ""
        typer.echo(f"{half.outcome:9} {half.found.key}{reason}")


def print_advice(
    advice: Sequence[Recommendation], memory_total_bytes: int, *, as_json: bool
) -> None:
    """The recommended models and why."""
    if as_json:
        specs = [{"model": item.spec.name, "licence": item.spec.licence} for item in advice]
        why = [{"reason": item.reason, "notes": item.notes} for item in advice]
        print_json([spec | told for spec, told in zip(specs, why, strict=True)])
        return
    typer.echo(f"For this machine with {format_bytes(memory_total_bytes)} of memory:")
    for item in advice:
        typer.echo(f"  {item.spec.name}: {item.reason} (licence {_licence(item.spec)})")
        for note in item.notes:
            typer.echo(f"    {note}")
    names = " ".join(item.spec.name for item in advice)
    typer.echo(f"Fetch them with: immich-ml-metal models pull {names}")
    typer.echo("Then choose them in Immich: Administration, Settings, Machine Learning.")


def print_info(
    spec: ModelSpec,
    statuses: Sequence[PartStatus],
    records: Mapping[str, FileRecord],
    settings: Settings,
    index: IndexFinding,
    choices: Choices,
    *,
    as_json: bool,
) -> None:
    """One model, what was measured of its engines, what changing to it means, and its index."""
    row = describe_model(spec, statuses) | {
        "origin": {path: asdict(record) for path, record in records.items()},
        "memory_bytes": memory_bytes(spec),
        "changing": what_changing_means(spec, settings),
        "index": index.as_dict(),
        "engines": {part: _verdicts(spec.key(part), choices) for part in spec.parts},
    }
    if as_json:
        print_json(row)
        return
    console = Console()
    console.print(_facts_table(_facts(spec, statuses)))
    if any(status.size_bytes for status in statuses):
        console.print(_files_table(statuses, records))
    _print_engines(console, row["engines"])
    console.print(row["changing"])
    if spec.task is not Task.OCR:
        style = "yellow" if index.state == "changed" else ""
        console.print(f"Index: {index.text}.", style=style, markup=False)


def describe_model(spec: ModelSpec, statuses: Sequence[PartStatus]) -> dict[str, Any]:
    """A model and what is here of it, as JSON can hold it."""
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


def _engines(spec: ModelSpec, choices: Choices) -> dict[str, str]:
    return {part: choices.answering(spec.key(part)).candidate.engine for part in spec.parts}


def _facts_table(facts: Mapping[str, str]) -> Table:
    table = make_table("", "")
    for label, value in facts.items():
        table.add_row(f"[bold]{label}[/]", value)
    return table


def _print_engines(console: Console, engines: Mapping[str, Any]) -> None:
    for part, told in engines.items():
        console.print(f"{part}: {told['chosen']}, {told['reason']}", markup=False)
        for candidate, verdict in told["verdicts"].items():
            console.print(f"  {candidate}: {verdict}", markup=False)


def _verdicts(key: ModelKey, choices: Choices) -> dict[str, Any]:
    """Who answers a half of a model, why, and what was found about each candidate."""
    choice = choices.answering(key)
    judged = choices.entry(key).judged.values()
    return {
        "chosen": str(choice.candidate),
        "reason": choice.reason,
        "verdicts": {str(one.candidate): str(one.verdict) for one in judged},
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


def _cells(spec: ModelSpec, statuses: Sequence[PartStatus]) -> dict[str, str]:
    return {
        "model": spec.name,
        "family": spec.family,
        "dim": str(spec.dim or "-"),
        "size": format_bytes(spec.size_bytes),
        "languages": _languages(spec),
        "licence": spec.licence,
        "here": describe_presence(statuses),
    }


def _table(columns: Sequence[str], rows: Sequence[Mapping[str, str]]) -> Table:
    table = make_table(*columns, whole=("model", "dim", "size"))
    for row in rows:
        table.add_row(*(row[column] for column in columns))
    return table


def describe_presence(statuses: Sequence[PartStatus]) -> str:
    """What is here of a model, in a word or two."""
    if all(status.state is FileState.MISSING and not status.size_bytes for status in statuses):
        return "[dim]-[/]"
    if all(status.elsewhere is not None for status in statuses):
        return "[green]in the rapidocr wheel[/]"
    if len({status.state for status in statuses}) == 1:
        return _styled(statuses[0].state)
    return ", ".join(f"{status.key.part} {_styled(status.state)}" for status in statuses)


def _styled(state: FileState) -> str:
    return f"[{_STYLE[state]}]{state}[/]"


def _languages(spec: ModelSpec) -> str:
    if MULTILINGUAL in spec.languages:
        return "100 or more"
    if len(spec.languages) > _MANY:
        return f"{len(spec.languages)} languages"
    return " ".join(spec.languages) or "-"


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
        "on disk": describe_presence(statuses),
        "size": f"about {parts}",
        "memory": f"about {memory}, for the weights",
        "vector": f"{spec.dim} numbers" if spec.dim else "none",
        "input": f"{spec.input_px} px, {spec.resize_mode or 'letterbox'}" if spec.input_px else "",
        "tokenizer": f"{spec.tokenizer}, {spec.context_length} tokens" if spec.tokenizer else "",
        "languages": ", ".join(spec.languages),
        "licence": _licence(spec),
    }
    return {label: value for label, value in facts.items() if value}


def _licence(spec: ModelSpec) -> str:
    limit = LIMITED.get(spec.licence)
    return f"{spec.licence}, {limit}" if limit else spec.licence


def _files_table(statuses: Sequence[PartStatus], records: Mapping[str, FileRecord]) -> Table:
    states = {path: state for status in statuses for path, state in status.files.items()}
    table = make_table("file", "state", "size", "from", "verified")
    for path, state in list(states.items())[:_MOST_FILES]:
        record = records.get(path)
        if record is None:
            table.add_row(path, state, "", "placed by hand", "")
            continue
        day = datetime.fromtimestamp(record.verified_at).strftime("%Y-%m-%d")
        origin = f"{record.source} {record.revision[:12]}"
        table.add_row(path, state, format_bytes(record.size_bytes), origin, day)
    if len(states) > _MOST_FILES:
        table.add_row(f"and {len(states) - _MOST_FILES} more")
    return table
