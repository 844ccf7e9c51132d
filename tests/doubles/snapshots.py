"""What a command prints, with its exit code, kept as text files beside the tests.

To add one: add a line to the cases of `tests/cli/test_snapshots.py` (a new command's `--help` is
found by itself), run `SNAPSHOTS=write pytest tests/cli/test_snapshots.py`, and read the difference
that git shows. What differs from machine to machine is masked by name, never loosely.
"""

import contextlib
import io
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from immich_ml_metal.cli import main
from immich_ml_metal.system.network_settings import CARRIED

FOLDER = Path(__file__).parents[1] / "cli" / "snapshots"
ENVIRONMENT = {"COLUMNS": "100", "LINES": "50", "NO_COLOR": "1", "TERM": "dumb", "ML_OFFLINE": "1"}


def run(words: Sequence[str], env: Mapping[str, str], typed: str = "") -> str:
    """Run the command line in this process; its words, exit code and output as one text."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            is_ours = name.startswith(("ML_", "MACHINE_LEARNING_", "IMMICH_", "HF_", "FORCE_"))
            if is_ours or name.upper() in CARRIED:
                patch.delenv(name)
        for name, value in {**ENVIRONMENT, **env}.items():
            patch.setenv(name, value)
        patch.setattr(sys, "stdin", io.StringIO(typed))
        code = 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main(words)
            except SystemExit as ended:
                code = int(ended.code or 0)
    parts = [" ".join(["$ immich-ml-metal", *words]), _trimmed(out.getvalue())]
    if told := _trimmed(err.getvalue()):
        parts.append(f"-- standard error\n{told}")
    return "\n".join([*filter(None, parts), f"-- exit code {code}"]) + "\n"


def check(name: str, text: str, masks: Mapping[str, str]) -> None:
    """Compare with the file of this name, or write it where `SNAPSHOTS=write` says so.

    Args:
        name: of the file, without `.txt`.
        text: what was printed.
        masks: pattern → stand-in for what no two machines or runs have alike.
    """
    for pattern, stand_in in masks.items():
        text = re.sub(pattern, stand_in, text, flags=re.MULTILINE)
    file = FOLDER / f"{name}.txt"
    if os.environ.get("SNAPSHOTS") == "write":
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
    kept = file.read_text(encoding="utf-8") if file.exists() else ""
    assert text == kept, f"{file} differs; SNAPSHOTS=write accepts what is printed now"


def _trimmed(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.splitlines()).strip("\n")
