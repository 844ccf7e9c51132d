"""An engine that fails on every tenth call, under load: only the metrics notice."""

import itertools
import re
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from doubles.engines import every_part
from doubles.live import ALL, TEXTUAL, predict, serve
from doubles.tiny_models import draw_faces, draw_text

from immich_ml_metal.backends.base import AnyModel
from immich_ml_metal.backends.ort.engine import OrtEngine
from immich_ml_metal.models.store import ModelStore
from immich_ml_metal.settings import Settings
from immich_ml_metal.types import ModelFiles, ModelKey, Tensor
from immich_ml_metal.worker.server import create_app

CLIENTS = 8


class Nuisance:
    """Counts inferences of all models, and spoils every tenth: an error, then NaN, in turn."""

    def __init__(self) -> None:
        self._calls = itertools.count(1)
        self._lock = threading.Lock()
        self.errors = self.not_finite = 0

    def next(self) -> str:
        with self._lock:
            call = next(self._calls)
            if call % 10:
                return "good"
            if call % 20:
                self.errors += 1
                return "error"
            self.not_finite += 1
            return "nan"


class SpoiltGraph:
    """The real graph, but for the thread whose turn it is to get NaN."""

    def __init__(self, graph: Any) -> None:
        self._graph = graph
        self.turn = threading.local()
        for name in ("inputs", "outputs", "metadata", "max_batch", "fixed_shapes", "size_bytes"):
            setattr(self, name, getattr(graph, name))

    def run(self, feeds: Mapping[str, Tensor]) -> list[Tensor]:
        outputs: list[Tensor] = self._graph.run(feeds)
        if getattr(self.turn, "is_bad", False):
            return [np.full_like(o, np.nan) if o.dtype.kind == "f" else o for o in outputs]
        return outputs

    def close(self) -> None:
        self._graph.close()


class Spoilt:
    def __init__(self, model: Any, nuisance: Nuisance) -> None:
        self._model, self._nuisance = model, nuisance
        self._graph = model._graph = SpoiltGraph(model._graph)
        self.max_batch, self.size_bytes = model.max_batch, model.size_bytes
        self.preprocess, self.postprocess = model.preprocess, model.postprocess
        self.close = model.close

    def infer(self, batch: Sequence[Any]) -> Sequence[Any]:
        what = self._nuisance.next()
        if what == "error":
            raise RuntimeError("[METAL] Command buffer execution failed: Insufficient Memory")
        self._graph.turn.is_bad = what == "nan"
        try:
            return list(self._model.infer(batch))
        finally:
            self._graph.turn.is_bad = False


class FlakyMlx:
    name = "mlx"
    needs_files = True

    def __init__(self, settings: Settings, nuisance: Nuisance) -> None:
        self._engine = OrtEngine(settings)
        self._nuisance = nuisance
        self.device = self._engine.device

    def load(self, key: ModelKey, files: ModelFiles | None) -> AnyModel:
        return Spoilt(self._engine.load(key, files), self._nuisance)


def count(text: str, name: str, **labels: str) -> float:
    found = re.findall(rf"^immich_ml_{name}_total{{([^}}]*)}} (\S+)$", text, re.MULTILINE)
    wanted = {f'{key}="{value}"' for key, value in labels.items()}
    return sum(float(value) for have, value in found if wanted <= set(have.split(",")))


@pytest.mark.parametrize(
    "seconds", [3, pytest.param(60, marks=[pytest.mark.soak, pytest.mark.timeout(300)])]
)
def test_every_answer_is_the_undisturbed_one_and_the_count_is_right(
    models: Path, seconds: int
) -> None:
    settings = Settings(models_dir=models, offline=True, model_ttl_s=0)
    questions: list[dict[str, Any]] = [
        {"entries": ALL, "image": draw_faces((160, 160), (320, 320))},
        {"entries": ALL, "image": draw_text("abc")},
        {"entries": TEXTUAL, "text": "red sea"},
    ]
    store = ModelStore(settings)
    with serve(create_app(settings, every_part(OrtEngine(settings)), store)) as url:
        expected = [predict(url, **question).json() for question in questions]
    nuisance = Nuisance()
    app = create_app(
        settings,
        every_part(FlakyMlx(settings, nuisance)),
        store,
        spare=lambda: OrtEngine(settings),
    )
    with serve(app) as url:
        before = httpx.get(f"{url}/metrics").text
        assert 'engine_failures_total{cause="error",engine="mlx"} 0.0' in before
        end_s = time.monotonic() + seconds

        def client(number: int) -> int:
            turn = number
            while turn < number + 3 or time.monotonic() < end_s:
                which = turn % len(questions)
                answer = predict(url, **questions[which])
                assert answer.status_code == 200, answer.text
                assert answer.json() == expected[which]
                turn += 1
            return turn - number

        with ThreadPoolExecutor(CLIENTS) as threads:
            done = sum(threads.map(client, range(CLIENTS)))
        after = httpx.get(f"{url}/metrics").text
    assert done >= 3 * CLIENTS
    assert nuisance.errors > 0
    assert count(after, "engine_failures", engine="mlx", cause="error") == nuisance.errors
    assert (
        count(after, "engine_failures", engine="mlx", cause="invalid_output") == nuisance.not_finite
    )
    assert count(after, "requests", status="500") == 0
