"""The worker app: HTTP in, HTTP out."""

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any

import psutil
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from immich_ml_metal import __version__, errors
from immich_ml_metal.backends.base import Engine, EngineTable
from immich_ml_metal.errors import EXIT_NO_MEMORY, what_ran_out
from immich_ml_metal.logs import REQUEST_ID_HEADER, request_scope
from immich_ml_metal.metrics import CONTENT_TYPE, Metrics, own_stages
from immich_ml_metal.settings import Settings
from immich_ml_metal.system.allocator import release_free_memory
from immich_ml_metal.tasks.images import ImageLimits, Picture, decode
from immich_ml_metal.threads import CpuThreads
from immich_ml_metal.types import Answer, TaskRequest
from immich_ml_metal.urgency import Urgency
from immich_ml_metal.worker.form import Form, read_form
from immich_ml_metal.worker.memory import MemoryRules
from immich_ml_metal.worker.other_formats import OtherFormats
from immich_ml_metal.worker.picture_cache import PictureCache
from immich_ml_metal.worker.pipeline import Pipeline, model_keys, urgency_of_tasks
from immich_ml_metal.worker.pool import Pool, Store
from immich_ml_metal.worker.preload import preload, preload_keys
from immich_ml_metal.worker.second_try import ANSWERED_BY_SPARE, CAUSES, Requalify, SecondTry
from immich_ml_metal.worker.wire import count_items, parse_entries, render

log = logging.getLogger(__name__)

_RENDERED_AT_ONCE = 16  # faces and lines: a millisecond
_HOUSEKEEPING_S = 10.0
ERROR_HEADER = "X-ML-Error"
# Their words say everything; a traceback would only repeat with every held request.
_TOLD_IN_WORDS = (errors.ModelError, errors.TimedOut, errors.Overloaded, errors.OutOfMemory)
TIMING_HEADER = "Server-Timing"
_TRIES = 3  # within a request's time: an engine that hangs, and the spare one on a slow machine


def create_app(
    settings: Settings,
    engines: EngineTable,
    store: Store,
    *,
    metrics: Metrics | None = None,
    describe_engines: Callable[[], dict[str, Any]] = dict,
    describe_index: Callable[[], list[dict[str, Any]]] = list,
    spare: Callable[[], Engine] | None = None,
    requalify: Requalify | None = None,
) -> Starlette:
    """Build the worker app around its engines and its model store; no module-level state.

    `metrics` are its own when None; `describe_engines` and `describe_index` tell what `/health`
    adds; `spare` makes the engine that answers where another fails, None for none; `requalify`
    judges an engine that was set aside.
    """
    service = WorkerRoutes(settings, engines, store, metrics, describe_engines, spare)
    service.describe_index = describe_index
    service.models.requalify = requalify

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with service:
            yield

    refusals: dict[Any, Any] = {HTTPException: _render_refusal}
    return Starlette(routes=service.routes(), exception_handlers=refusals, lifespan=lifespan)


class WorkerRoutes:
    """The routes and what they share: threads, pictures, models, numbers."""

    def __init__(
        self,
        settings: Settings,
        engines: EngineTable,
        store: Store,
        metrics: Metrics | None = None,
        describe_engines: Callable[[], dict[str, Any]] = dict,
        spare: Callable[[], Engine] | None = None,
    ) -> None:
        self.settings = settings
        self.describe_index: Callable[[], list[dict[str, Any]]] = list
        self.metrics = metrics or Metrics()
        self._describe_plan = describe_engines
        self._threads = CpuThreads(settings.request_threads)
        memory = MemoryRules(psutil.virtual_memory().total // 2)  # the rest is the owner's
        self.pool = Pool(engines, store, self._threads, self.metrics, memory=memory)
        others = OtherFormats() if settings.decode_other_formats else None
        self._pictures = PictureCache(_decode, self._threads, others=others)
        timeout_s = settings.request_timeout_s
        models = SecondTry(self.pool, spare, self.metrics, limit_s=timeout_s / _TRIES)
        self.models, self._engines = models, engines
        self._pipeline = Pipeline(models, self._pictures, self.metrics, timeout_s=timeout_s)
        self._admitted = _limits(settings.concurrency)
        self._started = time.monotonic()
        self._in_flight = self._answered = 0
        self._released_at = 0  # requests answered when free memory was last handed back
        self._housekeeper: asyncio.Task[None] | None = None
        self._preload_keys = preload_keys(settings)
        self._preloader: asyncio.Task[None] | None = None
        self._name_engines_in_metrics()

    def _name_engines_in_metrics(self) -> None:
        for (task, part), name in self._engines.names().items():
            self.metrics.engine_info.labels(f"{task}/{part}", name).set(1)
        for name in {*self._engines.names().values(), "cpu"}:
            for cause in CAUSES:  # at 0 from the start: a rate needs a first value
                self.metrics.engine_failures.labels(name, cause)
        self.metrics.fallbacks.labels(ANSWERED_BY_SPARE)
        for device in {engine.device for engine in self._engines.engines()}:
            self.metrics.watch_queue(device.name, partial(getattr, device, "queued"))

    async def __aenter__(self) -> "WorkerRoutes":
        # Not awaited: `/health` tells of its progress, and requests wait for their own model only.
        self._preloader = asyncio.create_task(preload(self.models, self._preload_keys))
        self._housekeeper = asyncio.create_task(self._keep_house())
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in (self._housekeeper, self._preloader):
            if task is not None:
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
        await self.pool.close()
        self._threads.close()
        self._pictures.close()

    async def _keep_house(self) -> None:
        """Now and then unload idle models, and hand freed memory back once nothing is going on."""
        ttl_s = self.settings.model_ttl_s
        while True:
            await asyncio.sleep(min(_HOUSEKEEPING_S, ttl_s or _HOUSEKEEPING_S))
            if ttl_s > 0:
                await self.pool.unload_idle(ttl_s, keep=self._preload_keys)
            if self._in_flight == 0 and self._answered > self._released_at:
                self._released_at = self._answered
                self._pictures.clear()
                await self._threads.run(release_free_memory)

    # -- routes ------------------------------------------------------------------------------------

    def routes(self) -> list[Route]:
        """Which path asks for what."""
        return [
            Route("/", self.root),
            Route("/ping", self.ping),
            Route("/health", self.health),
            Route("/metrics", self.render_metrics),
            Route("/predict", self.predict, methods=["POST"]),
        ]

    async def root(self, _: Request) -> JSONResponse:
        """Who is here, in the official service's words."""
        return JSONResponse({"message": "Immich ML"})

    async def ping(self, _: Request) -> PlainTextResponse:
        """Whether requests are answered; never waits for anything."""
        return PlainTextResponse("pong")

    async def health(self, _: Request | None = None) -> JSONResponse:
        """What runs where, as JSON. Never loads anything."""
        return JSONResponse(
            {
                "status": "ok",
                "version": __version__,
                "uptime_s": round(time.monotonic() - self._started, 1),
                "in_flight": self._in_flight,
                "progress": self.pool.progress + self._answered,
                "engines": {
                    f"{task}/{part}": name for (task, part), name in self._engines.names().items()
                },
                "engine_plan": self._describe_plan(),
                "index": self.describe_index(),
                "engine_failures": self.models.describe(),
                "models": self.pool.describe(),
                "loading": [str(key) for key in self.pool.loading],
                "downloads": self.pool.describe_downloads(),
                "picture_cache_bytes": self._pictures.size_bytes,
            }
        )

    async def render_metrics(self, _: Request) -> Response:
        """This process's numbers, for Prometheus."""
        return Response(self.metrics.render(), media_type=CONTENT_TYPE)

    async def predict(self, request: Request) -> Response:
        """Read the form, parse the entries, run the pipeline, render the answer."""
        with request_scope(request.headers.get(REQUEST_ID_HEADER)), own_stages() as stages:
            try:
                form = await self._read_form(request)
                tasks = parse_entries(form.entries, face_min_score=self.settings.face_min_score)
                answer = self._answer(tasks, form.image, form.text)
                response = await _unless_gone(request, answer)
            except ClientDisconnect:
                return Response(status_code=errors.CLIENT_GONE)
            except Exception as exc:  # noqa: BLE001 - told here, where the log knows the request
                return _refuse(what_ran_out(exc) or exc)
        response.headers[TIMING_HEADER] = _render_timing(stages)
        return response

    async def _answer(self, tasks: TaskRequest, image: bytes | None, text: str | None) -> Response:
        self._in_flight += 1
        self.metrics.in_flight.inc()
        status = errors.CLIENT_GONE  # what remains when this is cancelled
        try:
            async with self._admitted[urgency_of_tasks(tasks)]:
                answer = await self._pipeline.answer(tasks, image, text)
            body = await self._render(answer)
            status = 200
            return Response(body, media_type="application/json")
        except Exception as exc:
            status = errors.status_of(what_ran_out(exc) or exc)
            raise
        finally:
            self._in_flight -= 1
            self.metrics.in_flight.dec()
            self._answered += 1
            for task in sorted({key.task for key in model_keys(tasks)}):
                self.metrics.requests.labels(task, str(status)).inc()

    async def _render(self, answer: Answer) -> bytes:
        """The answer's JSON; a long one is written on a thread."""
        if count_items(answer) <= _RENDERED_AT_ONCE:
            return render(answer)
        return await self._threads.run(lambda: render(answer), Urgency.TEXT)

    async def _read_form(self, request: Request) -> Form:
        with self.metrics.stage("request", "read"):
            limit_bytes = self.settings.max_image_size_bytes
            return await read_form(request, self._threads, limit_bytes=limit_bytes)


def _limits(concurrency: int) -> dict[Urgency, asyncio.Semaphore]:
    """So many requests at once, and as many searches beside them."""
    searches, others = asyncio.Semaphore(concurrency), asyncio.Semaphore(concurrency)
    return {one: searches if one is Urgency.SEARCH else others for one in Urgency}


def _decode(data: bytes) -> Picture:
    return decode(data, ImageLimits())


async def _unless_gone(request: Request, work: Awaitable[Response]) -> Response:
    """Await `work`, but cancel it when the caller hangs up."""
    answer = asyncio.ensure_future(work)
    gone = asyncio.create_task(_wait_for_hang_up(request))
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            return answer.result()
        return Response(status_code=errors.CLIENT_GONE)
    finally:
        for task in (answer, gone):
            task.cancel()
        await asyncio.gather(answer, gone, return_exceptions=True)


async def _wait_for_hang_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _render_timing(stages: Mapping[str, float]) -> str:
    """The stages of one request as `Server-Timing` (W3C): what ran side by side is added up."""
    return ", ".join(f"{stage};dur={1000 * seconds:.1f}" for stage, seconds in stages.items())


# -- errors ----------------------------------------------------------------------------------------


async def _render_refusal(_: Request, exc: Exception) -> JSONResponse:
    """A path or method that is not there, in the words that the official service uses."""
    assert isinstance(exc, HTTPException), "registered for nothing else"
    return JSONResponse({"detail": exc.detail}, exc.status_code, headers=exc.headers)


def _refuse(exc: Exception) -> JSONResponse:
    """Answer with a failure. Without memory even for that, be replaced: the gateway asks again."""
    try:
        return _render_error(exc)
    except MemoryError:
        os._exit(EXIT_NO_MEMORY)


def _render_error(exc: Exception) -> JSONResponse:
    """The reason as JSON; what is our fault goes to the log as well, once."""
    status = errors.status_of(exc)
    if isinstance(exc, errors.Busy):  # nothing failed: the gateway asks again
        log.info("put off reason=%s", exc)
    elif isinstance(exc, _TOLD_IN_WORDS):  # it comes again until somebody mends it
        log.error("request failed status=%d reason=%s", status, exc)
    elif status >= 500:
        log.error("request failed status=%d", status, exc_info=exc)
    reason = str(exc)
    if not isinstance(exc, errors.ServiceError):
        reason = f"internal error: {type(exc).__name__}: {exc}"
    headers = {ERROR_HEADER: type(exc).__name__}  # tells the gateway what lasts
    after_s = errors.RETRY_AFTER_S.get(type(exc))  # type: ignore[arg-type]
    if after_s is not None:
        headers["Retry-After"] = str(after_s)
    return JSONResponse({"detail": reason}, status_code=status, headers=headers)
