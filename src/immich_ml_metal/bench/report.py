"""The tables of `bench`."""

from rich.console import Console
from rich.table import Table

from immich_ml_metal.bench.run import Measured, Result

MIB = 2**20


def render(result: Result, console: Console) -> None:
    """Print what was found, ratios last."""
    console.print(
        f"[bold]immich-ml-metal {result.version}[/] on {result.machine}, {result.cores} cores, "
        f"{result.pictures} pictures"
    )
    raw = {rate.task: rate.per_s for rate in result.raw}
    console.print(_raw_table(result))
    for measured in (result.ours, result.against):
        if measured is not None:
            console.print(_load_table(measured, raw))
    if result.against is not None:
        console.print(_ratio_table(result.ours, result.against))
    if result.ours.first_answer_s is not None and result.ours.resident_bytes is not None:
        console.print(
            f"First answer {result.ours.first_answer_s:.1f} s after the start; "
            f"resident memory after all tasks {result.ours.resident_bytes / MIB:.0f} MiB"
        )


def _raw_table(result: Result) -> Table:
    table = Table(title="Raw engine: ONNX Runtime alone, all cores, one inference at a time")
    table.add_column("graph")
    table.add_column("model")
    table.add_column("inferences/s", justify="right")
    for rate in result.raw:
        table.add_row(rate.task, rate.model, f"{rate.per_s:.1f}")
    return table


def _load_table(measured: Measured, raw: dict[str, float]) -> Table:
    table = Table(title=measured.url)
    for name in ("task", "clients", "requests/s", "p50 ms", "p95 ms", "service/raw"):
        table.add_column(name, justify="left" if name == "task" else "right")
    for name, loads in (*measured.loads.items(), ("whole import, photos", measured.imports)):
        for load in loads:
            ratio = f"{load.per_s / raw[name]:.2f}" if name in raw else ""
            table.add_row(
                name,
                str(load.clients),
                f"{load.per_s:.1f}",
                f"{load.p50_ms:.0f}",
                f"{load.p95_ms:.0f}",
                ratio,
            )
        table.add_section()
    return table


def _ratio_table(ours: Measured, other: Measured) -> Table:
    table = Table(title=f"Ours / {other.url}, requests per second")
    table.add_column("task")
    for load in ours.imports:
        table.add_column(f"{load.clients} clients", justify="right")
    rows = {name: (loads, other.loads[name]) for name, loads in ours.loads.items()}
    rows["whole import"] = (ours.imports, other.imports)
    for name, (mine, theirs) in rows.items():
        table.add_row(
            name, *(f"{a.per_s / b.per_s:.2f}" for a, b in zip(mine, theirs, strict=True))
        )
    return table
