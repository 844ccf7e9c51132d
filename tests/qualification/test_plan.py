"""The engines of a worker: made from what is remembered, nothing tested."""

from pathlib import Path
from typing import Any

import pytest
from doubles.engines import FakeEngine
from doubles.odd_engines import M_SERIES, odd_mac
from doubles.tiny_models import CLIP, make_models

from immich_ml_metal.backends.makers import MAKERS, Surroundings
from immich_ml_metal.backends.selection import Platform
from immich_ml_metal.errors import ConfigError
from immich_ml_metal.models.store import ModelStore
from immich_ml_metal.qualification.environment import Environment
from immich_ml_metal.qualification.plan import Choices, EnginePlan, Machine
from immich_ml_metal.qualification.record import Record
from immich_ml_metal.settings import Settings
from immich_ml_metal.state import StateFolder
from immich_ml_metal.types import SLOTS, ModelKey, Part, Task

LINUX = Machine(Platform("Linux", "x86_64"), Environment(), MAKERS)
READER = ModelKey(Task.OCR, Part.RECOGNITION, "PP-OCRv6_tiny")


def plan(models: Path, machine: Machine = LINUX, **settings: Any) -> EnginePlan:
    chosen = Settings(models_dir=models, offline=True, **settings)
    choices = Choices(chosen, machine, Record(StateFolder(models / "state")), ModelStore(chosen))
    return EnginePlan(choices, Surroundings(chosen))


def with_broken(name: str, problem: Exception) -> Machine:
    """A Mac on which one engine cannot even be made."""

    def fail(given: Surroundings) -> Any:
        raise problem

    fakes = {one: (lambda given, one=one: FakeEngine(name=one)) for one in MAKERS}
    return Machine(M_SERIES, Environment(), {**fakes, name: fail})


def test_on_linux_every_part_is_on_one_cpu_engine_and_nothing_is_pending(tmp_path: Path) -> None:
    made = plan(tmp_path)
    assert made.names() == dict.fromkeys(SLOTS, "cpu")
    assert [engine.name for engine in made.engines()] == ["cpu"]
    assert made.as_dict()["pending"] == []
    assert made.as_table().splitlines()[1].split() == ["task", "part", "engine", "numbers", "why"]


def test_on_a_mac_without_verdicts_all_configured_models_are_pending(tmp_path: Path) -> None:
    make_models(tmp_path)
    made = plan(tmp_path, odd_mac(tmp_path))
    assert made.names() == dict.fromkeys(SLOTS, "cpu")
    assert f"clip/visual/{CLIP}" in made.as_dict()["pending"]


def test_text_is_not_read_twice_where_vision_reads_while_finding(tmp_path: Path) -> None:
    vision = plan(tmp_path, odd_mac(tmp_path), ocr_engine="vision")
    assert not vision.serves(READER)
    assert (Task.OCR, Part.RECOGNITION) not in vision.names()
    assert plan(tmp_path).serves(READER)


def test_an_engine_asked_for_by_name_that_cannot_be_made_stops_the_start(tmp_path: Path) -> None:
    machine = with_broken("mlx", ImportError("no", name="mlx.core"))
    reason = "mlx, asked for by ML_CLIP_ENGINE, .* used here: mlx.core cannot be imported"
    with pytest.raises(ConfigError, match=reason):
        plan(tmp_path, machine, clip_engine="mlx")


def test_an_automatic_choice_that_cannot_be_made_leaves_its_work_to_the_cpu(
    tmp_path: Path,
) -> None:
    machine = with_broken("vision", ImportError("no", name="Vision"))
    made = plan(tmp_path, machine, profile="native")
    assert made.names()[Task.FACES, Part.DETECTION] == "cpu"
    assert "vision is not used: Vision cannot be imported" in made.warnings


def test_a_machine_where_nothing_works_does_not_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cpu, .*, cannot be used here: broken"):
        plan(tmp_path, with_broken("cpu", ImportError("broken")))


def test_a_model_name_that_is_none_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="clip_model"):
        plan(tmp_path, clip_model="buffalo_l")
