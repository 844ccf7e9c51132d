"""The check as a process of its own: `python -m immich_ml_metal.qualification.background`.

Started by the gateway when models wait for verdicts. It reads the settings and the models' names
as one line of JSON, and writes a line for each that is settled. It ends with its parent.
"""

import asyncio
import json
import logging
from collections.abc import Sequence

from immich_ml_metal.logs import configure_logging
from immich_ml_metal.models.store import ModelStore
from immich_ml_metal.qualification.checker import Checker, Tools
from immich_ml_metal.qualification.child import be_nice, read_order
from immich_ml_metal.qualification.children import measure
from immich_ml_metal.qualification.plan import Machine, remembered_choices
from immich_ml_metal.qualification.record import key_of
from immich_ml_metal.settings import Settings

log = logging.getLogger(__name__)


def main(tools: Tools | None = None, machine: Machine | None = None) -> None:
    """Settle what the order names; the real probe and machine unless others are given."""
    order = json.loads(read_order())
    be_nice()
    settings = Settings.model_validate_json(order["settings"])
    configure_logging(settings, "check")
    tools = tools or Tools(measure)
    asyncio.run(_settle(settings, order["models"], tools, machine))


async def _settle(
    settings: Settings, names: Sequence[str], tools: Tools, machine: Machine | None
) -> None:
    choices = remembered_choices(settings, ModelStore(settings), machine)
    checker = Checker(choices, tools)
    for name in names:
        try:
            choice = await checker.settle(key_of(name))
        except Exception:  # one model must not keep the others from their verdicts
            log.exception("not checked model=%s", name)
            choice = None
        told = {"model": name, "chosen": str(choice.candidate) if choice else None}
        print(json.dumps({**told, "remembered": not choices.record.trouble}), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
