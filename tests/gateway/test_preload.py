"""Which models are loaded at start, and what happens when one cannot be."""

import json
from collections.abc import Sequence

import pytest
from doubles.engines import TEXTUAL, VISUAL, FakeEngine, FakeStore, every_part
from doubles.gateway import settings
from doubles.timing import until

from immich_ml_metal.errors import ConfigError, DownloadFailed
from immich_ml_metal.models.progress import DownloadProgress, Phase
from immich_ml_metal.settings_sources import load_settings
from immich_ml_metal.types import ModelKey, Part, Task
from immich_ml_metal.worker.preload import preload, preload_keys
from immich_ml_metal.worker.server import WorkerRoutes

CLIP = "ViT-B-32__openai"
FACES = ModelKey(Task.FACES, Part.DETECTION, "buffalo_l")


class FakePool:
    def __init__(self, *, broken: ModelKey | None = None, unserved: ModelKey | None = None) -> None:
        self.loaded: list[ModelKey] = []
        self._broken = broken
        self._unserved = unserved

    def serves(self, key: ModelKey) -> bool:
        return key != self._unserved

    async def get(self, key: ModelKey) -> None:
        if key == self._broken:
            raise DownloadFailed("no network")
        self.loaded.append(key)


@pytest.mark.parametrize(
    ("environ", "keys"),
    [
        ({}, ()),
        ({"MACHINE_LEARNING_PRELOAD__CLIP__TEXTUAL": CLIP}, (TEXTUAL,)),
        ({"MACHINE_LEARNING_PRELOAD__CLIP": CLIP}, (TEXTUAL, VISUAL)),
        (
            {
                "MACHINE_LEARNING_PRELOAD__FACIAL_RECOGNITION__DETECTION": "buffalo_l,buffalo_l",
                "ML_PRELOAD_CLIP_TEXTUAL": "immich-app/ViT-B-32::openai",
            },
            (TEXTUAL, FACES),
        ),
    ],
)
def test_the_official_names_say_what_is_loaded(
    environ: dict[str, str], keys: tuple[ModelKey, ...]
) -> None:
    assert preload_keys(load_settings(environ=environ)) == keys


def test_a_name_that_is_no_such_model_is_refused() -> None:
    chosen = load_settings(environ={"ML_PRELOAD_OCR_DETECTION": CLIP})
    with pytest.raises(ConfigError, match="preload_ocr_detection: 'ViT-B-32__openai' is"):
        preload_keys(chosen)


async def test_a_model_that_cannot_be_loaded_does_not_keep_the_next_one_out() -> None:
    pool = FakePool(broken=TEXTUAL)
    await preload(pool, (TEXTUAL, VISUAL))
    assert pool.loaded == [VISUAL]


async def test_a_half_that_no_worker_runs_is_left_out() -> None:
    pool = FakePool(unserved=TEXTUAL)
    await preload(pool, (TEXTUAL, VISUAL))
    assert pool.loaded == [VISUAL]


async def test_an_worker_app_loads_them_at_start_and_keeps_them() -> None:
    chosen = settings(preload_clip_textual=(CLIP,), model_ttl_s=0.01)
    worker = FakeEngine()
    async with WorkerRoutes(chosen, every_part(worker), FakeStore()) as service:
        await until(lambda: bool(service.pool.loaded))
        await service.pool.get(VISUAL)
        await until(lambda: any(model.closed for model in worker.models))  # the other one's time
        assert [loaded.key for loaded in service.pool.loaded] == [TEXTUAL]


class FetchingStore(FakeStore):
    def downloads(self) -> Sequence[DownloadProgress]:
        return [DownloadProgress(VISUAL, Phase.DOWNLOADING, 25, 100, 1.0, 25.0)]


async def test_an_worker_app_tells_how_far_its_downloads_are() -> None:
    async with WorkerRoutes(settings(), every_part(FakeEngine()), FetchingStore()) as service:
        health = json.loads(bytes((await service.health()).body))
    assert health["downloads"] == [
        {
            "model": "ViT-B-32__openai/visual",
            "phase": "downloading",
            "done_bytes": 25,
            "total_bytes": 100,
            "rate_bytes_s": 25,
            "remaining_s": 3.0,
            "note": None,
        }
    ]
