"""The gateway has engines checked beside the worker, and nobody waits for it."""

import json
import sys
from collections.abc import Mapping
from typing import Any

import pytest

from immich_ml_metal.gateway.qualifier import Qualifier

pytestmark = pytest.mark.anyio

NAME = "clip/visual/ViT-B-32__openai"
PENDING = {"engine_plan": {"pending": [NAME], "serving": {NAME: "cpu float32"}}}


def command(*lines: Mapping[str, Any], status: int = 0) -> list[str]:
    """A process that reads its order, says these lines and ends."""
    said = "\n".join(json.dumps(line) for line in lines)
    return [sys.executable, "-c", f"input(); print({said!r}); raise SystemExit({status})"]


class World:
    def __init__(self, *lines: Mapping[str, Any], **options: Any) -> None:
        self.health: Mapping[str, Any] | None = PENDING
        self.chosen = 0
        self.asked = 0
        self.qualifier = Qualifier(
            "{}", ask=self.ask, on_chosen=self.on_chosen, command=command(*lines), **options
        )

    async def ask(self) -> Mapping[str, Any] | None:
        self.asked += 1
        return self.health

    def on_chosen(self) -> None:
        self.chosen += 1


def chosen(engine: str | None, *, remembered: bool = True) -> dict[str, Any]:
    return {"model": NAME, "chosen": engine, "remembered": remembered}


async def test_another_engine_that_was_chosen_lets_the_worker_start_anew_once() -> None:
    world = World(chosen("mlx float16"))
    await world.qualifier.look()
    await world.qualifier.look()
    assert world.chosen == 1
    assert world.qualifier.describe() == {"checking": [], "settled": {NAME: "mlx float16"}}


async def test_the_engine_that_answers_anyway_disturbs_nobody() -> None:
    world = World(chosen("cpu float32"))
    await world.qualifier.look()
    assert world.chosen == 0


async def test_a_choice_that_could_not_be_remembered_disturbs_nobody() -> None:
    world = World(chosen("mlx float16", remembered=False))
    await world.qualifier.look()
    assert world.chosen == 0


async def test_what_could_not_be_checked_is_left_alone_for_a_while() -> None:
    world = World(chosen(None), again_s=1000)
    await world.qualifier.look()
    await world.qualifier.look()
    assert world.qualifier.describe()["settled"] == {}
    impatient = World(chosen(None), again_s=0)
    await impatient.qualifier.look()
    impatient.health = None  # nothing new at the worker, and yet it is tried again
    impatient.qualifier._command = command(chosen("mlx float16"))
    await impatient.qualifier.look()
    assert impatient.chosen == 1


async def test_where_nothing_is_pending_no_process_is_started() -> None:
    world = World()
    world.qualifier._command = ["/nonexistent"]
    world.health = {"engine_plan": {"pending": []}}
    await world.qualifier.look()
    world.health = None
    await world.qualifier.look()


async def test_a_check_that_dies_leaves_the_service_alone() -> None:
    world = World(again_s=1000)
    world.qualifier._command = command(status=3)
    world.qualifier._command = [sys.executable, "-c", "import os; os.abort()"]
    await world.qualifier.look()
    assert world.chosen == 0
