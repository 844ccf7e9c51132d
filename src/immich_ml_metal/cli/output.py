"""How every command ends and speaks: exit codes, one JSON document for scripts, shared options."""

import json
import os
import shutil
import sys
from collections.abc import Collection
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:  # it takes longer to load than most commands to run
    from rich.table import Table


class Exit(IntEnum):
    """How a command ended, the same for every command; documented in `docs/operate.md`."""

    OK = 0
    FINDING = 1  # it ran, and the answer is no: a failed check, a difference, a stopped service
    USAGE = 2  # a wrong option or setting
    UNREACHABLE = 3  # the other side could not be asked
    UNSAFE = 4  # parity: do not mix
    INTERRUPTED = 130  # Ctrl-C
    READER_GONE = 141  # whoever reads the output (`| head`) went before its end; as for SIGPIPE


JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
FolderOption = Annotated[Path | None, typer.Option("--models-dir", help="Model folder.")]
EnvFileOption = Annotated[  # whoever reads it says why it cannot
    Path | None, typer.Option("--env-file", readable=False, help="An Immich .env file.")
]
ClipOption = Annotated[str | None, typer.Option("--clip-model", help="CLIP model to ask for.")]
FaceOption = Annotated[str | None, typer.Option("--face-model", help="Face model to ask for.")]
OcrOption = Annotated[str | None, typer.Option("--ocr-model", help="Text model to ask for.")]


def print_json(value: Any) -> None:
    """Print one document; what is not ASCII is escaped, as a pipe may have any encoding."""
    typer.echo(json.dumps(value, indent=2))


def make_table(*columns: str, whole: Collection[str] = (), right: Collection[str] = ()) -> "Table":
    """A table that cuts nothing short: what is wider than its column goes on below.

    Args:
        columns: the headings; none is shown where all are empty.
        whole: columns that are never broken.
        right: columns of numbers.
    """
    from rich.table import Table

    table = Table(box=None, header_style="bold", show_header=any(columns))
    for name in columns:
        table.add_column(
            name,
            overflow="fold",
            no_wrap=name in whole,
            justify="right" if name in right else "left",
        )
    return table


def print_error(reason: object) -> None:
    """Say on standard error why the command does not end well."""
    typer.echo(f"immich-ml-metal: {reason}", err=True)


def own_command() -> str:
    """How to call this program from where the user stands: by its name, else by its path."""
    name = "immich-ml-metal"
    program = Path(sys.argv[0]).absolute()
    if program.name != name:  # `python -m`
        program = Path(sys.executable).with_name(name)
    found = shutil.which(name)
    if not program.exists() or (found is not None and Path(found).resolve() == program.resolve()):
        return name
    here = os.path.relpath(program)
    return str(program) if here.startswith("..") else here
