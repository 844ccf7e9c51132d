"""`python -m immich_ml_metal.onnx_mlx MODEL.onnx`: explain it, or compare it with ONNX Runtime."""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from immich_ml_metal.errors import ServiceError
from immich_ml_metal.onnx_mlx.compare import Difference, Shape, compare_nodes, compare_outputs
from immich_ml_metal.onnx_mlx.explain import explain, render, render_reasons
from immich_ml_metal.onnx_mlx.formats import NumberFormat

app = typer.Typer(add_completion=False)


def parse_shape(text: str) -> tuple[str, Shape]:
    """`x=1,3,48,320` → ("x", (1, 3, 48, 320))."""
    name, _, lengths = text.rpartition("=")
    try:
        shape = tuple(int(length) for length in lengths.split(","))
    except ValueError:
        shape = ()
    if not name or not shape or min(shape) < 1:
        raise typer.BadParameter(f"{text!r} is not NAME=1,2,3")
    return name, shape


@app.command()
def main(
    model: Annotated[Path, typer.Argument(help="The ONNX file.", exists=True, dir_okay=False)],
    *,
    why: Annotated[bool, typer.Option(help="Say why nodes were left unfused.")] = False,
    compare: Annotated[bool, typer.Option(help="Run on MLX and on ONNX Runtime.")] = False,
    nodes: Annotated[bool, typer.Option(help="Compare every value of the graph.")] = False,
    dtype: Annotated[
        NumberFormat, typer.Option(help="Number format on MLX.")
    ] = NumberFormat.FLOAT32,
    shape: Annotated[list[str] | None, typer.Option(help="Input shape, NAME=1,3,48,320.")] = None,
    above: Annotated[float, typer.Option(help="Show nodes that differ by more (relative).")] = 0.0,
) -> None:
    """Explain a model; with --compare or --nodes, run it against ONNX Runtime on random input."""
    shapes = dict(parse_shape(text) for text in shape or [])
    try:
        found = explain(model, shapes)
        typer.echo(render(found))
        if why:
            typer.echo(render_reasons(found))
        if compare or nodes:
            measure = compare_nodes if nodes else compare_outputs
            _print_differences(measure(model, dtype, shapes), above if nodes else 0.0)
    except ServiceError as exc:
        typer.echo(str(exc), err=True)
        sys.exit(1)


def _print_differences(found: Iterable[Difference], above: float) -> None:
    typer.echo(f"{'largest':>10} {'relative':>10} {'cosine':>12}  value")
    for difference in found:
        if difference.relative >= above:
            typer.echo(_row(difference))


def _row(found: Difference) -> str:
    operator = f" ({found.operator})" if found.operator else ""
    return (
        f"{found.largest:10.2e} {found.relative:10.2e} {found.cosine:12.9f}  {found.name}{operator}"
    )


if __name__ == "__main__":
    app()
