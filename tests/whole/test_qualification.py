"""The whole service on a Mac whose engines misbehave: it answers, and it learns meanwhile."""

import asyncio
import contextlib
import json
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from doubles.gateway import free_port
from doubles.live import TEXTUAL, VISUAL, face_entries, text_entries
from doubles.odd_engines import command_of, journal, write_scenario
from doubles.tiny_models import CLIP, FACES, OCR, draw_faces, make_models

from immich_ml_metal.settings import Settings

pytestmark = pytest.mark.anyio

PATIENCE_S = 90.0
HALVES = 6  # of the three configured models
NOT_VISION = {"ocr_engine": "mlx"}  # the double of Vision reads no text


@pytest.fixture
def models(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    make_models(folder)
    return folder


@contextlib.asynccontextmanager
async def running(models: Path, **changes: Any) -> AsyncIterator[httpx.AsyncClient]:
    """The service of `odd_service_main` on a free port."""
    settings = Settings(
        host="127.0.0.1",
        port=free_port(),
        models_dir=models,
        state_dir=changes.pop("state_dir", models / "state"),
        offline=True,
        clip_model=CLIP,
        face_model=FACES,
        ocr_model=OCR,
        **{**NOT_VISION, **changes},
    )
    command = (*command_of("odd_service_main"), "gateway", settings.model_dump_json())
    process = await asyncio.create_subprocess_exec(*command, start_new_session=True)
    url = f"http://127.0.0.1:{settings.port}"
    try:
        async with httpx.AsyncClient(base_url=url, timeout=PATIENCE_S) as client:
            yield client
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        await process.wait()


async def health(client: httpx.AsyncClient) -> dict[str, Any]:
    with contextlib.suppress(httpx.TransportError):
        told: dict[str, Any] = (await client.get("/health")).json()
        return told
    return {}


async def until(condition: Any) -> None:
    end_s = time.monotonic() + PATIENCE_S
    while not await condition():
        assert time.monotonic() < end_s, "it did not come about"
        await asyncio.sleep(0.1)


async def ready(client: httpx.AsyncClient) -> None:
    async def is_ready() -> bool:
        return bool((await health(client)).get("worker", {}).get("state") == "ready")

    await until(is_ready)


async def settled(client: httpx.AsyncClient, count: int = HALVES) -> dict[str, Any]:
    """Who was chosen, once all models are settled and a worker is ready again."""
    found: dict[str, Any] = {}

    async def is_settled() -> bool:
        told = await health(client)
        found.update(told.get("qualification", {}).get("settled", {}))
        return len(found) >= count and told["worker"]["state"] == "ready"

    await until(is_settled)
    return found


class Importer:
    """Asks every task again and again, as an import does, and counts what went wrong."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client
        self._picture = draw_faces((200, 200))
        self.answered = 0
        self.failed: list[str] = []
        self.slowest_s = 0.0

    async def run(self) -> None:
        while True:
            for entries in (VISUAL, face_entries(model=FACES), text_entries(model=OCR)):
                await self._ask(entries, files={"image": self._picture})
            await self._ask(TEXTUAL, text="red sea")

    async def _ask(self, entries: Any, *, files: Any = None, text: str | None = None) -> None:
        form = {"entries": json.dumps(entries)} | ({"text": text} if text else {})
        started_s = time.monotonic()
        answer = await self._client.post("/predict", data=form, files=files)
        self.slowest_s = max(self.slowest_s, time.monotonic() - started_s)
        if answer.status_code == 200:
            self.answered += 1
        else:
            self.failed.append(answer.text)

    @contextlib.asynccontextmanager
    async def working(self) -> AsyncIterator[None]:
        work = asyncio.create_task(self.run())
        try:
            yield
        finally:
            work.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await work


async def serves(client: httpx.AsyncClient, number_format: str) -> bool:
    """Whether the worker that answers now has search pictures in this format."""
    told = (await health(client)).get("worker", {}).get("health") or {}
    tasks = told.get("engine_plan", {}).get("tasks", {})
    return bool(tasks.get("clip/visual", {}).get("number_format") == number_format)


SPOILED = {"abort": "crashed", "hang": "hung", "throw": "failed", "lie": "wrong", "nan": "wrong"}


@pytest.mark.parametrize("does", SPOILED)
async def test_an_engine_that_misbehaves_is_a_verdict_and_requests_never_notice(
    models: Path, does: str
) -> None:
    write_scenario(models, mlx_float16=does)
    settings = {"face_detection_engine": "cpu", "face_recognition_engine": "cpu"}
    async with running(models, **settings, ocr_engine="cpu") as client:
        await ready(client)
        importer = Importer(client)
        async with importer.working():
            chosen = await settled(client, count=2)
        assert importer.failed == []
        assert importer.answered > 0
        assert chosen[f"clip/visual/{CLIP}"] == "mlx mixed"
        verdicts = json.loads((models / "state" / "engines.json").read_text())["models"]
        verdict = verdicts[f"clip/visual/{CLIP}"]["verdicts"]["mlx float16"]
        assert verdict["outcome"] == SPOILED[does]
        assert verdict["reason"]
        await until(lambda: serves(client, "mixed"))


async def test_the_next_start_is_fast_and_tests_nothing_again(models: Path) -> None:
    write_scenario(models)
    async with running(models) as client:
        await settled(client)
    probes = len(journal(models, "probe"))
    assert probes == HALVES
    async with running(models) as client:
        await ready(client)
        told = await health(client)
        plan = told["worker"]["health"]["engine_plan"]
        assert plan["pending"] == []
        assert plan["tasks"]["clip/visual"]["engine"] == "mlx"
        await asyncio.sleep(7)  # longer than the gateway waits before it looks
        assert (await health(client))["qualification"] == {"checking": [], "settled": {}}
    assert len(journal(models, "probe")) == probes


async def test_a_changed_key_in_mid_import_disturbs_nobody(models: Path) -> None:
    write_scenario(models)
    async with running(models) as client:
        await settled(client)
    write_scenario(models, system="macOS 26B2")
    loads = len(journal(models, "load"))
    async with running(models) as client:
        importer = Importer(client)
        await ready(client)
        async with importer.working():
            await settled(client)
        told = await health(client)
        assert importer.failed == []
        assert importer.answered > 0
        assert told["worker_starts"] == 1  # the last good choice answered, and was right again
    first = [line for line in journal(models, "load")[loads:] if line.startswith("cpu")]
    assert first == []
    assert len(journal(models, "probe")) == 2 * HALVES


async def test_while_memory_is_short_the_service_answers_and_no_probe_starts(models: Path) -> None:
    write_scenario(models, memory=2**30)
    async with running(models) as client:
        await ready(client)
        importer = Importer(client)
        async with importer.working():
            await asyncio.sleep(12)  # the gateway looks after five seconds
        assert importer.failed == []
        assert journal(models, "probe") == []
        assert (await health(client))["qualification"]["settled"] == {}


async def test_a_state_folder_that_cannot_be_used_stops_nothing_and_is_said(models: Path) -> None:
    write_scenario(models)
    (models / "no-folder").write_text("")
    async with running(models, state_dir=models / "no-folder") as client:
        await ready(client)
        importer = Importer(client)
        async with importer.working():
            await settled(client)
        told = await health(client)
        assert importer.failed == []
        assert told["worker_starts"] == 1
        warnings = told["worker"]["health"]["engine_plan"]["warnings"]
        assert any("are not remembered" in warning for warning in warnings)
