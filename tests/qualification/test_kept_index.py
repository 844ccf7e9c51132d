"""Verdicts are about what the index guard goes on serving: its files, and its way to find faces."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from doubles.odd_engines import odd_mac
from doubles.tiny_models import CLIP, FACES, make_models

from immich_ml_metal.backends.selection import FACE_FINDING
from immich_ml_metal.index_guard.guard import IndexGuard
from immich_ml_metal.models.store import ModelStore
from immich_ml_metal.onnx_files.derived import digest_of
from immich_ml_metal.qualification.checker import Checker, Tools
from immich_ml_metal.qualification.order import Order
from immich_ml_metal.qualification.plan import Choices, remembered_choices
from immich_ml_metal.qualification.probe import files_of
from immich_ml_metal.qualification.verdict import Outcome, Verdict
from immich_ml_metal.settings import Settings
from immich_ml_metal.types import ModelKey, Part, Task
from immich_ml_metal.worker.compose import _choices

pytestmark = pytest.mark.anyio

VISUAL = ModelKey(Task.CLIP, Part.VISUAL, CLIP)
FINDER = ModelKey(*FACE_FINDING, FACES)
TELLER = ModelKey(Task.FACES, Part.RECOGNITION, FACES)


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """Revision main, and beside it v2 with another picture half."""
    make_models(tmp_path)
    folder = tmp_path / "clip" / CLIP
    shutil.copytree(folder, tmp_path / "copy")
    shutil.move(tmp_path / "copy", folder / "v2")
    with (folder / "v2" / "visual" / "model.onnx").open("ab") as file:
        file.write(bytes([6 << 3 | 2, 1]) + b"x")  # a doc string: another digest
    return tmp_path


def settings_of(models: Path, **changes: Any) -> Settings:
    return Settings(
        models_dir=models,
        state_dir=models / "state",
        offline=True,
        clip_model=CLIP,
        face_model=FACES,
        **changes,
    )


def make_index(settings: Settings, points: str, *keys: ModelKey) -> None:
    guard, store = IndexGuard(settings, points), ModelStore(settings)
    for key in keys:
        guard.files(key, store.ensure)


def worker_choices(settings: Settings) -> Choices:
    return _choices(settings, odd_mac(settings.models_dir), ModelStore(settings))[0]


async def settle(settings: Settings, key: ModelKey) -> tuple[list[str], str]:
    """Who was asked, and who was chosen, as in the process that checks."""
    asked: list[str] = []

    async def measure(order: Order) -> Verdict:
        asked.append(str(order.candidate))
        return Verdict(Outcome.RIGHT)

    choices = remembered_choices(settings, ModelStore(settings), odd_mac(settings.models_dir))
    tools = Tools(measure, lambda: (8 * 2**30, 8 * 2**30))
    choice = await Checker(choices, tools).settle(key)
    return asked, str(choice.candidate) if choice else "nobody"


async def test_a_verdict_is_about_the_files_that_the_guard_goes_on_serving(models: Path) -> None:
    make_index(settings_of(models), "immich", VISUAL)
    changed = settings_of(models, model_revision="v2")
    served = models / "clip" / CLIP / "visual" / "model.onnx"
    probed = files_of(changed, VISUAL)
    assert probed is not None
    assert probed.graph == served
    assert await settle(changed, VISUAL) == (["mlx float16"], "mlx float16")
    choices = worker_choices(changed)
    assert choices.entry(VISUAL).digest == digest_of(served)
    assert not choices.of(VISUAL).is_pending
    IndexGuard(changed).history.accept(f"clip/{CLIP}")
    assert worker_choices(changed).of(VISUAL).is_pending  # v2 itself was never measured


async def test_faces_that_are_held_are_checked_on_the_engines_that_may_find_them(
    models: Path,
) -> None:
    make_index(settings_of(models), "immich", FINDER, TELLER)
    native = settings_of(models, profile="native")
    first = worker_choices(native).of(FINDER)
    assert first.is_pending
    assert first.candidate.family == "immich"
    assert await settle(native, FINDER) == (["mlx float16"], "mlx float16")
    again = worker_choices(native).of(FINDER)
    assert (str(again.candidate), again.is_pending) == ("mlx float16", False)


async def test_faces_held_by_vision_wait_for_no_verdict_about_others(models: Path) -> None:
    make_index(settings_of(models, profile="native"), "vision", FINDER, TELLER)
    balanced = settings_of(models)
    choice = worker_choices(balanced).of(FINDER)
    assert (choice.candidate.engine, choice.is_pending) == ("vision", False)
    assert await settle(balanced, FINDER) == ([], "vision its own")
