"""Probes in children: whatever an engine does there is a verdict."""

import os
import sys
from pathlib import Path

import pytest
from doubles.odd_engines import write_scenario
from doubles.odd_service_main import PROBE
from doubles.tiny_models import CLIP, FACES, OCR, make_models

from immich_ml_metal.backends.selection import Candidate
from immich_ml_metal.qualification.checker import LIMITS_S
from immich_ml_metal.qualification.children import measure
from immich_ml_metal.qualification.order import Order
from immich_ml_metal.qualification.verdict import Outcome, Verdict
from immich_ml_metal.settings import Settings
from immich_ml_metal.system.footprint import memory_bytes
from immich_ml_metal.types import ModelKey, Part, Task

pytestmark = pytest.mark.anyio

VISUAL = ModelKey(Task.CLIP, Part.VISUAL, CLIP)
FLOAT16 = Candidate("mlx", "float16")


@pytest.fixture
def models(tmp_path: Path) -> Path:
    make_models(tmp_path)
    return tmp_path


async def probe(
    models: Path,
    does: str,
    key: ModelKey = VISUAL,
    *,
    depth: str = "check",
    limit_s: float = 60.0,
) -> Verdict:
    write_scenario(models, mlx_float16=does)
    settings = Settings(models_dir=models, offline=True).model_dump_json()
    return await measure(Order(settings, key, FLOAT16, depth, limit_s), PROBE)


@pytest.mark.parametrize(
    "key",
    [
        VISUAL,
        ModelKey(Task.CLIP, Part.TEXTUAL, CLIP),
        ModelKey(Task.FACES, Part.DETECTION, FACES),
        ModelKey(Task.FACES, Part.RECOGNITION, FACES),
        ModelKey(Task.OCR, Part.DETECTION, OCR),
        ModelKey(Task.OCR, Part.RECOGNITION, OCR),
    ],
    ids=str,
)
async def test_an_engine_that_computes_as_the_cpu_is_right(models: Path, key: ModelKey) -> None:
    verdict = await probe(models, "right", key)
    assert verdict.outcome is Outcome.RIGHT
    assert verdict.figures.cosine == pytest.approx(1)
    assert verdict.figures.not_finite == 0


async def test_an_abort_is_a_verdict_with_its_signal(models: Path) -> None:
    verdict = await probe(models, "abort")
    assert verdict.outcome is Outcome.CRASHED
    assert verdict.reason.startswith("SIGABRT while opening the model")


async def test_a_hang_of_140_seconds_ends_at_the_limit(models: Path) -> None:
    verdict = await probe(models, "hang", limit_s=12)
    assert verdict == Verdict(Outcome.HUNG, "no end within 12 s, while running the first item")
    assert max(LIMITS_S.values()) < 1000  # what the service itself allows


async def test_an_exception_is_a_verdict_with_its_words(models: Path) -> None:
    verdict = await probe(models, "throw")
    assert verdict.outcome is Outcome.FAILED
    assert "Command buffer execution failed" in verdict.reason


async def test_a_cosine_of_099_is_wrong(models: Path) -> None:
    verdict = await probe(models, "lie")
    assert verdict.outcome is Outcome.WRONG
    assert verdict.reason == "cosine to float32 on the CPU 0.99, limit 0.9998"


async def test_values_that_are_not_finite_are_wrong(models: Path) -> None:
    verdict = await probe(models, "nan")
    assert verdict.outcome is Outcome.WRONG
    assert "values that are not finite" in verdict.reason


async def test_a_comparison_tells_speeds_and_memory(models: Path) -> None:
    verdict = await probe(models, "right", depth="comparison")
    assert verdict.figures.alone_ms is not None
    assert verdict.figures.alone_ms > 0
    assert verdict.figures.memory_bytes is not None


async def test_a_number_format_that_an_engine_has_not_is_unavailable(models: Path) -> None:
    settings = Settings(models_dir=models, offline=True).model_dump_json()
    order = Order(settings, VISUAL, Candidate("mlx", "float8"), "check", 60)
    verdict = await measure(order, PROBE)
    assert verdict == Verdict(Outcome.UNAVAILABLE, "the mlx engine has no number format float8")


@pytest.mark.skipif(sys.platform == "darwin", reason="this is a Mac: tests/apple asks Vision")
async def test_a_library_that_is_not_here_is_unavailable(models: Path) -> None:
    settings = Settings(models_dir=models, offline=True).model_dump_json()
    key = ModelKey(Task.OCR, Part.DETECTION, OCR)
    verdict = await measure(Order(settings, key, Candidate("vision", "its own"), "check", 60))
    assert verdict == Verdict(Outcome.UNAVAILABLE, "Vision cannot be imported")


async def test_a_probe_that_is_given_up_leaves_no_process(models: Path) -> None:
    import asyncio

    write_scenario(models, mlx_float16="hang")
    settings = Settings(models_dir=models, offline=True).model_dump_json()
    task = asyncio.ensure_future(measure(Order(settings, VISUAL, FLOAT16, "check", 60), PROBE))
    await asyncio.sleep(1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    with pytest.raises(ChildProcessError):  # reaped, and no other child is left
        os.waitpid(-1, os.WNOHANG)


def saying(code: str) -> tuple[str, ...]:
    """A probe that does anything but measure."""
    return (sys.executable, "-c", f"import json, os, sys; sys.stdin.readline(); {code}")


VERDICT = '{"verdict": {"outcome": "right", "reason": "", "figures": {}}}'
FORK = "import subprocess; subprocess.Popen(['sleep', '60'], start_new_session=NEW); print(SAID)"
ENDS = {
    "ends with 0 and says nothing": ("", "crashed: exit status 0 while starting"),
    "prints garbage": (
        "sys.stdout.buffer.write(b'\\xff[[[\\n' + b'[' * 60000 + b'\\n7\\n{\\n'); sys.exit(3)",
        "crashed: exit status 3 while starting",
    ),
    "gives words for figures": (
        'print(\'{"verdict": {"outcome": "right", "reason": "", "figures": {"cosine": "1"}}}\')',
        "crashed: exit status 0 while starting",
    ),
    "floods": (f"[print('x' * 1000000) for _ in range(30)]; print({VERDICT!r})", "right"),
    "leaves a child in its group": (
        FORK.replace("NEW", "False").replace("SAID", repr(VERDICT)),
        "right",
    ),
    "leaves a child in another group": (
        FORK.replace("NEW", "True").replace("SAID", repr(VERDICT)),
        "right",
    ),
}


@pytest.mark.parametrize("what", ENDS)
async def test_whatever_a_probe_says_is_a_verdict_in_time(what: str) -> None:
    code, expected = ENDS[what]
    order = Order("{}", VISUAL, FLOAT16, "check", 30)
    assert str(await measure(order, saying(code))) == expected


async def test_a_flood_without_end_is_a_hang_and_fills_no_memory() -> None:
    order = Order("{}", VISUAL, FLOAT16, "check", 2)
    before = memory_bytes(os.getpid()) or 0
    verdict = await measure(order, saying("exec('while True: print(1000 * str(1))')"))
    assert verdict.outcome is Outcome.HUNG
    assert (memory_bytes(os.getpid()) or 0) - before < 100 * 2**20


async def test_mlx_itself_is_measured_here(models: Path) -> None:
    pytest.importorskip("immich_ml_metal.backends.mlx", reason="the mlx engine is not here")
    settings = Settings(models_dir=models, offline=True).model_dump_json()
    verdict = await measure(Order(settings, VISUAL, Candidate("mlx", "float32"), "check", 120))
    assert verdict.outcome is Outcome.RIGHT
