"""All candidates compared, with engines that do as they are told; and the report to post."""

import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from doubles.odd_engines import odd_mac
from doubles.tiny_models import CLIP, make_models

from immich_ml_metal.backends.selection import Candidate
from immich_ml_metal.models.store import ModelStore
from immich_ml_metal.qualification.comparison import Compared, Comparison
from immich_ml_metal.qualification.order import Order
from immich_ml_metal.qualification.plan import remembered_choices
from immich_ml_metal.qualification.record import Entry, Record, name_of
from immich_ml_metal.qualification.report import render_report
from immich_ml_metal.qualification.verdict import Figures, Outcome, Verdict
from immich_ml_metal.settings import Settings
from immich_ml_metal.state import StateFolder
from immich_ml_metal.types import ModelKey, Part, Task

pytestmark = pytest.mark.anyio

KEY = ModelKey(Task.CLIP, Part.VISUAL, CLIP)
FINDER = ModelKey(Task.FACES, Part.DETECTION, "buffalo_s")
SPEEDS = {
    "mlx float16": 8,
    "mlx mixed": 9,
    "mlx float32": 16,
    "coreml float16": 12,
    "coreml float32": 4,
    "cpu float32": 30,
}


class World:
    def __init__(self, models: Path, speeds: Mapping[str, float], wrong: str = "") -> None:
        make_models(models)
        self.models, self.speeds, self.wrong = models, speeds, wrong
        self.asked: list[str] = []
        self.state = StateFolder(models / "state")

    async def measure(self, order: Order) -> Verdict:
        name = str(order.candidate)
        self.asked.append(name)
        ms = self.speeds.get(name, 50)
        outcome = Outcome.WRONG if name == self.wrong else Outcome.RIGHT
        return Verdict(outcome, figures=Figures(cosine=0.9999, alone_ms=ms, batch_ms=ms, batch=8))

    async def compare(
        self, key: ModelKey = KEY, *, again: bool = False, **settings: Any
    ) -> Compared:
        chosen = Settings(
            models_dir=self.models, state_dir=self.state.path, offline=True, **settings
        )
        choices = remembered_choices(chosen, ModelStore(chosen), odd_mac(self.models))
        comparison = Comparison(choices, self.measure, again=again)
        found = await comparison.compare(key, lambda candidate: None)
        assert found is not None
        return found

    def entry(self, key: ModelKey = KEY) -> Entry:
        return Record(self.state).entries()[name_of(key)]


async def test_the_fastest_that_is_right_is_chosen_and_remembered(tmp_path: Path) -> None:
    world = World(tmp_path, SPEEDS)
    compared = await world.compare()
    assert world.asked == list(SPEEDS)
    assert compared.choice.candidate == Candidate("coreml")
    assert world.entry().chosen == Candidate("coreml")


async def test_a_fast_one_that_is_wrong_is_not_chosen(tmp_path: Path) -> None:
    world = World(tmp_path, SPEEDS, wrong="coreml float32")
    assert (await world.compare()).choice.candidate == Candidate("mlx", "float16")


async def test_what_is_known_is_measured_only_by_wish(tmp_path: Path) -> None:
    world = World(tmp_path, SPEEDS)
    await world.compare()
    rows = (await world.compare()).rows
    assert len(world.asked) == len(SPEEDS)
    assert not any(row.is_new for row in rows)
    await world.compare(again=True)
    assert len(world.asked) == 2 * len(SPEEDS)


async def test_here_faces_move_because_the_operator_asks(tmp_path: Path) -> None:
    world = World(tmp_path, SPEEDS)
    under, kept = "profile native", Candidate("mlx", "float16")
    Record(world.state).change(FINDER, lambda _: Entry(chosen=kept, chosen_under=under))
    compared = await world.compare(FINDER, profile="native")
    assert compared.choice.candidate.engine == "vision"


async def test_the_report_tells_figures_and_nothing_of_its_owner(tmp_path: Path) -> None:
    world = World(tmp_path, SPEEDS, wrong="mlx mixed")
    text = render_report(odd_mac(tmp_path).environment, [await world.compare()])
    assert "| mlx | float16 | 0.9999000 | - | 8.0 | 8.0 of 8 | - | right |" in text
    assert "| mlx | mixed | 0.9999000 | - | 9.0 | 9.0 of 8 | - | wrong |" in text
    assert "Chosen: coreml float32, profile balanced" in text
    for private in (str(tmp_path), str(Path.home()), socket.gethostname()):
        assert private not in text
