"""`models info`: one model, its files and their origin, and what changing to it means."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime

from rich.console import Console
from rich.table import Table

from immich_ml_metal.catalog import ModelSpec
from immich_ml_metal.cli.json_output import print_json
from immich_ml_metal.cli.models_show import describe_model, describe_presence
from immich_ml_metal.models.advice import memory_bytes
from immich_ml_metal.models.manifest import FileRecord
from immich_ml_metal.models.progress import format_bytes
from immich_ml_metal.models.shelf import PartStatus
from immich_ml_metal.settings import Settings
from immich_ml_metal.types import Task

_MOST_FILES = 12  # M-CLIP has some 390


def print_info(
    spec: ModelSpec,
    statuses: Sequence[PartStatus],
    records: Mapping[str, FileRecord],
    settings: Settings,
    *,
    as_json: bool,
) -> None:
    """One model, with what changing to it means."""
    row = describe_model(spec, statuses)
    row["origin"] = {path: asdict(record) for path, record in records.items()}
    row["memory_bytes"] = memory_bytes(spec)
    row["changing"] = what_changing_means(spec, settings)
    if as_json:
        print_json(row)
        return
    table = Table(show_header=False, box=None)
    for label, value in _facts(spec, statuses).items():
        table.add_row(f"[bold]{label}[/]", value)
    console = Console()
    console.print(table)
    if any(status.size_bytes for status in statuses):
        console.print(_files_table(statuses, records))
    console.print(row["changing"])


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
        "licence": spec.licence,
    }
    return {label: value for label, value in facts.items() if value}


def _files_table(statuses: Sequence[PartStatus], records: Mapping[str, FileRecord]) -> Table:
    states = {path: state for status in statuses for path, state in status.files.items()}
    table = Table("file", "state", "size", "from", "verified", box=None)
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
