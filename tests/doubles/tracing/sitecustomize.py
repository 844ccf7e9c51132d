"""Lets a Python process note which files of the package it enters, from its first line on.

Python imports a module of this name at every start that finds one on its path: with this folder in
`PYTHONPATH` and `TRACE_FOLDER` set, that is every process of a command, unchanged. What was entered
since the last time is written at SIGUSR1 and at the end, in the order of the first entry, to
`TRACE_FOLDER/<pid>.<count>.json`.
"""

import atexit
import json
import os
import signal
import sys
import threading
from inspect import CO_OPTIMIZED
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

_PACKAGE = f"{os.sep}immich_ml_metal{os.sep}"


class Notes:
    """The files entered since the last `write`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0
        self._entered: dict[str, None] = {}

    def see(self, frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            code: CodeType = frame.f_code
            # modules and class bodies run at the import; only functions are optimised
            if code.co_flags & CO_OPTIMIZED and _PACKAGE in code.co_filename:
                self._entered[code.co_filename.rpartition(_PACKAGE)[2]] = None

    def write(self, *_: object) -> None:
        noted = {"command": sys.orig_argv, "entered": list(self._entered)}
        self._entered.clear()
        self._count += 1
        path = self._folder / f"{os.getpid()}.{self._count}.json"
        path.with_suffix(".part").write_text(json.dumps(noted))
        path.with_suffix(".part").rename(path)


if "TRACE_FOLDER" in os.environ:
    notes = Notes(Path(os.environ["TRACE_FOLDER"]))
    signal.signal(signal.SIGUSR1, notes.write)
    atexit.register(notes.write)
    threading.setprofile(notes.see)
    sys.setprofile(notes.see)
