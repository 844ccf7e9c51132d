"""`python -m immich_ml_metal.onnx_mlx MODEL.onnx`: explain it, or compare it with ONNX Runtime."""

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import mlx.core as mx
import typer

from immich_ml_metal.errors import ServiceError
from immich_ml_metal.onnx_mlx.compare import Difference, Shape, compare_nodes, compare_outputs
from immich_ml_metal.onnx_mlx.explain import explain, render, render_reasons

app = typer.Typer(add_completion=False)


class Format(StrEnum):
    """Number formats of a run."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


_DTYPES = {
    Format.FLOAT32: mx.float32,
    Format.FLOAT16: mx.float16,
    Format.BFLOAT16: mx.bfloat16,
}


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
    dtype: Annotated[Format, typer.Option(help="Number format on MLX.")] = Format.FLOAT32,
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
            typer.echo(f"{'largest':>10} {'relative':>10} {'cosine':>12}  value")
        if nodes:
            for value in compare_nodes(model, _DTYPES[dtype], shapes):
                if value.relative >= above:
                    typer.echo(_row(value))
        elif compare:
            for value in compare_outputs(model, _DTYPES[dtype], shapes):
                typer.echo(_row(value))
    except ServiceError as exc:
        typer.echo(str(exc), err=True)
        sys.exit(1)


def _row(found: Difference) -> str:
    operator = f" ({found.operator})" if found.operator else ""
    return (
        f"{found.largest:10.2e} {found.relative:10.2e} {found.cosine:12.9f}  {found.name}{operator}"
    )


if __name__ == "__main__":
    app()
