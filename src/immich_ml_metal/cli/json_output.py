"""How every command speaks to scripts: the option, and one JSON document on stdout."""

import json
from typing import Annotated, Any

import typer

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]


def print_json(value: Any) -> None:
    """Print one document; what is not ASCII is escaped, as a pipe may have any encoding."""
    typer.echo(json.dumps(value, indent=2))
