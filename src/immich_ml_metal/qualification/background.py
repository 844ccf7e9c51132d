"""The check as a process of its own: `python -m immich_ml_metal.qualification.background`.

Started by the gateway when models wait for verdicts. It reads the settings and the models' names
as one line of JSON, and writes a line for each that is settled. It ends with its parent.
"""

import asyncio
import contextlib
import json
import os
import sys
import threading
from collections.abc import Sequence

from immich_ml_metal.logs import configure_logging
from immich_ml_metal.models.store import ModelStore
from immich_ml_metal.qualification.checker import LIMITS_S, Checker, Tools, machine_memory
from immich_ml_metal.qualification.children import COMMAND, measure
from immich_ml_metal.qualification.plan import Machine, remembered_choices
from immich_ml_metal.qualification.record import key_of
from immich_ml_metal.settings import Settings

_STDIN = 0
_NICENESS = 10


def main(tools: Tools | None = None, machine: Machine | None = None) -> None:
    """Settle what the order names; the real probe and machine unless others are given."""
    order = json.loads(_read_line())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.suppress(OSError):
        os.nice(_NICENESS)
    settings = Settings.model_validate_json(order["settings"])
    configure_logging(settings, "check")
    tools = tools or Tools(lambda one: measure(one, COMMAND), machine_memory, LIMITS_S)
    asyncio.run(_settle(settings, order["models"], tools, machine))


async def _settle(
    settings: Settings, names: Sequence[str], tools: Tools, machine: Machine | None
) -> None:
    choices = remembered_choices(settings, ModelStore(settings), machine)
    checker = Checker(choices, tools)
    for name in names:
        choice = await checker.settle(key_of(name))
        told = {"model": name, "chosen": str(choice.candidate) if choice else None}
        print(json.dumps({**told, "remembered": not choices.record.trouble}), flush=True)  # noqa: T201


def _read_line() -> bytes:
    line = bytearray()
    while not line.endswith(b"\n"):
        if not (chunk := os.read(_STDIN, 65_536)):
            sys.exit("the parent went away before it gave its order")
        line += chunk
    return bytes(line)


def _end_with_parent() -> None:
    while os.read(_STDIN, 65_536):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
