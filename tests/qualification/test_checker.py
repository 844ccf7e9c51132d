"""The check that the service makes by itself: the ladder, the memory gate, and what it keeps."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from doubles.odd_engines import odd_mac, write_scenario
from doubles.tiny_models import CLIP, make_models

from immich_ml_metal.backends.selection import Candidate
from immich_ml_metal.models.store import ModelStore
from immich_ml_metal.qualification.checker import Checker, Tools
from immich_ml_metal.qualification.choice import Choice
from immich_ml_metal.qualification.order import Order
from immich_ml_metal.qualification.plan import remembered_choices
from immich_ml_metal.qualification.record import Record, name_of
from immich_ml_metal.qualification.verdict import Outcome, Verdict
from immich_ml_metal.settings import Settings
from immich_ml_metal.state import StateFolder
from immich_ml_metal.types import ModelKey, Part, Task

pytestmark = pytest.mark.anyio

KEY = ModelKey(Task.CLIP, Part.VISUAL, CLIP)
GIB = 2**30


class World:
    """A Mac whose engines do as `outcomes` say; nothing is really run."""

    def __init__(self, models: Path, outcomes: Mapping[str, Outcome]) -> None:
        make_models(models)
        self.models = models
        self.outcomes = dict(outcomes)
        self.asked: list[str] = []
        self.free_bytes = 6 * GIB
        self.on_measure: Callable[[], object] = lambda: None
        self.state = models / "state"

    async def measure(self, order: Order) -> Verdict:
        self.asked.append(str(order.candidate))
        self.on_measure()
        return Verdict(self.outcomes.get(str(order.candidate), Outcome.RIGHT))

    async def settle(self, key: ModelKey = KEY, **settings: Any) -> Choice | None:
        """Settle as a fresh process does."""
        chosen = Settings(models_dir=self.models, offline=True, state_dir=self.state, **settings)
        tools = Tools(self.measure, lambda: (self.free_bytes, 8 * GIB))
        choices = remembered_choices(chosen, ModelStore(chosen), odd_mac(self.models))
        return await Checker(choices, tools).settle(key)

    async def ask_again(self) -> bool:
        """As the worker does of an engine that it had set aside."""
        chosen = Settings(
            models_dir=self.models, state_dir=self.state, offline=True, clip_engine="mlx"
        )
        tools = Tools(self.measure, lambda: (self.free_bytes, 8 * GIB))
        choices = remembered_choices(chosen, ModelStore(chosen), odd_mac(self.models))
        return await Checker(choices, tools).is_right_again(KEY)


@pytest.mark.parametrize(("outcome", "is_right"), [(Outcome.RIGHT, True), (Outcome.HUNG, False)])
async def test_an_engine_set_aside_is_probed_again_and_nothing_is_remembered(
    tmp_path: Path, outcome: Outcome, is_right: bool
) -> None:
    world = World(tmp_path, {"mlx float16": outcome})
    assert await world.ask_again() is is_right
    assert world.asked[0] == "mlx float16"
    assert not world.state.exists()


async def test_without_memory_for_a_probe_it_is_tried_at_work(tmp_path: Path) -> None:
    world = World(tmp_path, {"mlx float16": Outcome.HUNG})
    world.free_bytes = 0
    assert await world.ask_again()
    assert world.asked == []


async def candidate(world: World) -> Candidate:
    choice = await world.settle()
    assert choice is not None
    return choice.candidate


async def test_the_first_choice_that_is_right_ends_the_check(tmp_path: Path) -> None:
    world = World(tmp_path, {})
    assert await candidate(world) == Candidate("mlx", "float16")
    assert world.asked == ["mlx float16"]


async def test_the_ladder_goes_down_to_the_cpu(tmp_path: Path) -> None:
    wrong: dict[str, Outcome] = dict.fromkeys(
        ("mlx float16", "mlx mixed", "mlx float32", "coreml float16", "coreml float32"),
        Outcome.WRONG,
    )
    world = World(tmp_path, wrong)
    assert await candidate(world) == Candidate("cpu")
    assert world.asked == list(wrong)


async def test_the_next_start_tests_nothing_again(tmp_path: Path) -> None:
    world = World(tmp_path, {"mlx float16": Outcome.WRONG})
    assert await candidate(world) == await candidate(world) == Candidate("mlx", "mixed")
    assert world.asked == ["mlx float16", "mlx mixed"]


async def test_a_new_macos_has_it_checked_again(tmp_path: Path) -> None:
    world = World(tmp_path, {})
    await world.settle()
    write_scenario(tmp_path, system="macOS 26B2")
    await world.settle()
    assert world.asked == ["mlx float16", "mlx float16"]


async def test_other_weights_have_it_checked_again_and_a_touched_file_does_not(
    tmp_path: Path,
) -> None:
    world = World(tmp_path, {})
    await world.settle()
    graph = tmp_path / "clip" / CLIP / "visual" / "model.onnx"
    content = graph.read_bytes()
    graph.write_bytes(content)  # another time of change
    await world.settle()
    assert world.asked == ["mlx float16"]
    graph.write_bytes(content + _unknown_field())
    await world.settle()
    assert world.asked == ["mlx float16", "mlx float16"]


async def test_a_model_that_is_replaced_while_it_is_measured_is_left_for_later(
    tmp_path: Path,
) -> None:
    world = World(tmp_path, {})
    graph = tmp_path / "clip" / CLIP / "visual" / "model.onnx"
    world.on_measure = lambda: graph.write_bytes(graph.read_bytes() + _unknown_field())
    assert await world.settle() is None
    assert Record(StateFolder(world.state)).entries()[name_of(KEY)].judged == {}
    world.on_measure = lambda: None
    assert await candidate(world) == Candidate("mlx", "float16")
    assert world.asked == ["mlx float16", "mlx float16"]


def _unknown_field() -> bytes:
    """A doc string of the model (field 6), which decides nothing but changes the digest."""
    return bytes([6 << 3 | 2, 1]) + b"x"


async def test_a_hang_and_a_crash_are_asked_once_more_before_they_are_believed(
    tmp_path: Path,
) -> None:
    world = World(tmp_path, {"mlx float16": Outcome.HUNG, "mlx mixed": Outcome.CRASHED})
    assert await candidate(world) == Candidate("mlx", "float32")
    assert world.asked == [*("mlx float16",) * 2, *("mlx mixed",) * 2, "mlx float32"]


async def test_no_probe_starts_while_memory_is_short(tmp_path: Path) -> None:
    world = World(tmp_path, {})
    world.free_bytes = GIB
    assert await world.settle() is None
    assert world.asked == []
    world.free_bytes = 6 * GIB
    assert await candidate(world) == Candidate("mlx", "float16")


async def test_a_model_that_is_not_here_is_left_for_later(tmp_path: Path) -> None:
    world = World(tmp_path, {})
    assert await world.settle(ModelKey(Task.CLIP, Part.VISUAL, "ViT-L-14__openai")) is None
    assert world.asked == []


async def test_a_state_that_cannot_be_kept_still_gives_a_choice(tmp_path: Path) -> None:
    world = World(tmp_path, {"mlx float16": Outcome.WRONG})
    world.state.write_text("a file where the folder should be")
    assert await candidate(world) == Candidate("mlx", "mixed")
    assert world.asked == ["mlx float16", "mlx mixed"]


async def test_vision_needs_no_files_to_be_checked(tmp_path: Path) -> None:
    world = World(tmp_path, {})
    choice = await world.settle(ModelKey(Task.OCR, Part.DETECTION, "EN__PP-OCRv5_mobile"))
    assert choice is not None
    assert choice.candidate.engine == "vision"


READER = ModelKey(Task.OCR, Part.DETECTION, "EN__PP-OCRv5_mobile")


@pytest.mark.parametrize(
    ("key", "engine", "changed"),
    [
        (KEY, {"clip_engine": "mlx"}, {"graph_rewriting": ("off",)}),
        (KEY, {"clip_engine": "coreml"}, {"use_ane": False}),
        (READER, {}, {"ocr_language_correction": False}),
    ],
)
async def test_a_setting_that_changes_the_numbers_asks_for_a_new_verdict(
    tmp_path: Path, key: ModelKey, engine: dict[str, Any], changed: dict[str, Any]
) -> None:
    world = World(tmp_path, {})

    def is_pending(**settings: Any) -> bool:
        chosen = Settings(models_dir=tmp_path, offline=True, state_dir=world.state, **settings)
        choices = remembered_choices(chosen, ModelStore(chosen), odd_mac(tmp_path))
        return choices.of(key).is_pending

    await world.settle(key, **engine)
    assert not is_pending(**engine)
    assert is_pending(**engine, **changed)
