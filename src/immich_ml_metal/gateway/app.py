"""The public face: takes requests in, holds them until the worker has answered, is always there.

Knows nothing about models, pictures or what a request asks for.
"""

import asyncio
import contextlib
import logging
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, NamedTuple

from immich_ml_metal.errors import (
    RETRY_AFTER_S,
    ConfigError,
    Overloaded,
    RequestError,
    ServiceError,
    status_of,
)
from immich_ml_metal.gateway.admission import ClientGone, Reception, make_reception
from immich_ml_metal.gateway.asked import TASKS, Upload
from immich_ml_metal.gateway.client import WorkerAnswer
from immich_ml_metal.gateway.companions import Companions, make_companions, see_own_side
from immich_ml_metal.gateway.crashes import CrashRecord
from immich_ml_metal.gateway.dispatcher import Dispatcher
from immich_ml_metal.gateway.health import Parts, report
from immich_ml_metal.gateway.history import History
from immich_ml_metal.gateway.holding import Holding
from immich_ml_metal.gateway.http import Message, Receive, Send, reply, reply_json, reply_unread
from immich_ml_metal.gateway.page import Page, is_foreign, redirect, send_to_page
from immich_ml_metal.gateway.probe import Prober
from immich_ml_metal.gateway.qualifier import COMMAND as CHECK_COMMAND
from immich_ml_metal.gateway.qualifier import Qualifier
from immich_ml_metal.gateway.supervisor import Order, WorkerState
from immich_ml_metal.gateway.terminal import Teller
from immich_ml_metal.gateway.troubles import Refused, Troubles, is_failure, reason_of
from immich_ml_metal.gateway.watch import Watch
from immich_ml_metal.logs import REQUEST_ID_HEADER, request_id, request_scope
from immich_ml_metal.metrics import CONTENT_TYPE, Metrics, merge
from immich_ml_metal.settings import Settings

logger = logging.getLogger(__name__)

Scope = Mapping[str, Any]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

WORKER_COMMAND = (sys.executable, "-m", "immich_ml_metal.worker.process")

_TEXT = (b"content-type", b"text/plain; charset=utf-8")
_RETRY = (b"retry-after", b"%d" % RETRY_AFTER_S[Overloaded])
_REQUEST_ID = REQUEST_ID_HEADER.lower().encode()
_CLIENTS_FAULT = 400
_ASK_TIMEOUT_S = 0.25  # what `/health` and `/metrics` wait for the worker's part


class _Told(NamedTuple):
    """What became of a request: its status (None when nobody was left), whether it is our fault."""

    status: int | None = None
    is_lost: bool = False


class Gateway:
    """The ASGI app; its lifespan is the worker's.

    `port` is the one people use; with the setting 0 it is known once the server listens.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        command: Sequence[str] = WORKER_COMMAND,
        check_command: Sequence[str] = CHECK_COMMAND,
        companions: Companions | None = None,
        crashes: CrashRecord | None = None,
        reception: Reception | None = None,
    ) -> None:
        self.settings = settings
        self.is_draining = False
        self.open_requests = 0
        self.broken: BaseException | None = None
        self.on_broken: Callable[[], None] = lambda: None
        self.port = settings.port
        self.started_s = time.monotonic()
        self.metrics = Metrics("gateway")
        self.crashes = crashes or CrashRecord()
        self._make_way(command, reception or make_reception(settings.max_image_size_bytes))
        self.refused, self.history = Refused(), History()
        self.watch = Watch(settings, self.dispatcher)
        self.qualifier = self._make_qualifier(check_command)
        own = see_own_side(self.dispatcher, self.troubles, self.prober, lambda: self.port)
        self.companions = companions or make_companions(settings, self.metrics, own)
        self._page = Page(
            settings, self.history, lambda: self.watch.last_health or {}, port=lambda: self.port
        )
        self._pages = self._make_pages()
        self._feed_gauges()

    def _make_way(self, command: Sequence[str], reception: Reception) -> None:
        """What a request goes through."""
        self.troubles = Troubles(reception.room.largest_bytes // len(TASKS))
        self.dispatcher = _dispatcher(self, command)
        self.prober = Prober(self.dispatcher, self.troubles)
        self.holding = Holding(
            self.dispatcher, reception, self.troubles, hold_limit_s=self.settings.hold_limit_s
        )

    def _make_pages(self) -> dict[str, App]:
        """What answers GET: a path itself and all below it."""
        return {
            "/": self._root,
            "/ping": self._ping,
            "/health": self._health,
            "/metrics": self._metrics_page,
            "/ui": self._page,
        }

    def _make_qualifier(self, command: Sequence[str]) -> Qualifier:
        return Qualifier(
            self.settings.model_dump_json(),
            ask=self.watch.ask_news,
            on_chosen=lambda: self.dispatcher.recycle(Order("engines were chosen")),
            command=command,
        )

    def _make_teller(self) -> Teller:
        supervisor = self.dispatcher.supervisor
        return Teller(
            self.settings,
            self.history,
            is_up=lambda: supervisor.state is WorkerState.READY,
            port=lambda: self.port,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or follow the server's life."""
        if scope["type"] == "lifespan":
            await _follow(self, receive, send)
        elif scope["type"] == "http":
            headers = dict(scope["headers"])
            sent_id = headers.get(_REQUEST_ID, b"").decode("latin-1") or None
            with request_scope(sent_id) as name:
                await self._route(scope, headers, receive, self._observed(scope, send, name))

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Own a worker for the length of the block; it starts at once, and is not waited for."""
        tasks = [
            asyncio.create_task(self.dispatcher.supervisor.run()),
            asyncio.create_task(self.watch.run()),
            asyncio.create_task(self.prober.run()),
            asyncio.create_task(self.companions.run()),
            asyncio.create_task(self.qualifier.run()),
            asyncio.create_task(self._make_teller().run()),
        ]
        for task in tasks:
            task.add_done_callback(self._task_ended)
        self.dispatcher.expect()
        is_planned = False
        try:
            yield
            is_planned = True
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if is_planned:  # not at a second SIGTERM: what was in flight is lost
                await self.companions.close()

    def can_serve(self) -> bool:
        """Whether a request that arrives now can be expected to be answered."""
        return not (self.is_draining or self.crashes.is_looping(time.monotonic()))

    def _feed_gauges(self) -> None:
        queue, supervisor = self.dispatcher.queue, self.dispatcher.supervisor
        self.metrics.in_flight.set_function(lambda: float(self.open_requests))
        self.metrics.watch_queue("worker", lambda: float(queue.waiting))
        self.metrics.worker_up.set_function(lambda: float(supervisor.state is WorkerState.READY))

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        """Without its supervisor the gateway would hold requests for nothing: let it end."""
        if not task.cancelled() and (failure := task.exception()) is not None:
            if not isinstance(failure, ConfigError):  # its words are the command's last line
                logger.critical("the gateway cannot go on", exc_info=failure)
            self.broken = failure
            self.on_broken()

    def _observed(self, scope: Scope, send: Send, name: str) -> Send:
        """Count each answer, name it, and let connections end while draining."""
        started_s = time.perf_counter()
        path = scope["path"] if scope["path"] in {*self._pages, "/predict"} else "other"

        async def observed(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [*message["headers"], (_REQUEST_ID, name.encode())]
                if self.is_draining:
                    headers.append((b"connection", b"close"))
                message = {**message, "headers": headers}
                self.metrics.http_requests.labels(path, str(message["status"])).inc()
                self.metrics.http_seconds.labels(path).observe(time.perf_counter() - started_s)
            await send(message)

        return observed

    async def _route(
        self, scope: Scope, headers: Mapping[bytes, bytes], receive: Receive, send: Send
    ) -> None:
        path, method = scope["path"], scope["method"]
        page = self._pages.get("/ui" if path.startswith("/ui/") else path)
        if path == "/predict" and method == "POST":
            if is_foreign(headers):
                detail = "the Origin of this request is another site than its Host"
                await reply_unread(receive, send, 403, detail)
                return
            await self._predict(headers, receive, send)
        elif page is not None and method == "GET":
            await page(scope, receive, send)
        elif page is not None or path == "/predict":
            allowed = b"POST" if page is None else b"GET"
            await reply_json(send, 405, {"detail": "Method Not Allowed"}, (b"allow", allowed))
        else:
            await reply_json(send, 404, {"detail": "Not Found"})

    async def _root(self, scope: Scope, receive: Receive, send: Send) -> None:
        if send_to_page(dict(scope["headers"])):
            await redirect(send)
        else:
            await reply_json(send, 200, {"message": "Immich ML"})

    async def _ping(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.can_serve():
            await reply(send, 200, [_TEXT], b"pong")
        else:
            await reply(send, 503, [_TEXT, _RETRY], b"unavailable")

    async def _health(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.watch.ask(_ASK_TIMEOUT_S)
        parts = Parts(
            dispatcher=self.dispatcher,
            crashes=self.crashes,
            holding=self.holding,
            watch=self.watch,
            qualifier=self.qualifier,
            started_s=self.started_s,
            is_draining=self.is_draining,
        )
        queues = {
            "refused": self.refused.describe(),
            "troubles": self.troubles.describe(),
            "guard": self.companions.describe(),
            "rates": self.history.rates(),
        }
        is_for_people = scope["query_string"] == b"pretty" or send_to_page(dict(scope["headers"]))
        self._page.note_models(bool((self.watch.health or {}).get("models")))
        await reply_json(send, 200, report(parts) | queues, indent=2 if is_for_people else None)

    async def _metrics_page(self, scope: Scope, receive: Receive, send: Send) -> None:
        parts = {"gateway": self.metrics.render()}
        if (worker := await self.watch.ask_metrics(_ASK_TIMEOUT_S)) is not None:
            parts["worker"] = worker
        await reply(send, 200, [(b"content-type", CONTENT_TYPE.encode())], merge(parts))

    async def _predict(self, headers: Mapping[bytes, bytes], receive: Receive, send: Send) -> None:
        self.open_requests += 1
        self.dispatcher.counts.received += 1
        upload = Upload(receive)
        told = _Told()
        started_s = time.monotonic()
        self.companions.begin()
        try:
            told = await self._hold(headers, upload, send)
        finally:
            self.open_requests -= 1
            self.companions.end(upload.asked, is_lost=told.is_lost)
            self.history.note(upload.head, told.status, time.monotonic() - started_s)

    async def _hold(self, headers: Mapping[bytes, bytes], upload: Upload, send: Send) -> _Told:
        """Answer one `/predict`."""
        try:
            answer = await self.holding.answer(headers, upload, request_id.get() or "")
        except ClientGone:
            self.dispatcher.counts.cancelled += 1
            return _Told()
        except ServiceError as exc:
            return await self._refuse(exc, upload, send)
        return await self._pass_on(answer, send)

    async def _pass_on(self, answer: WorkerAnswer, send: Send) -> _Told:
        self.dispatcher.counts.answered += 1
        if is_lost := is_failure(answer):
            self._note_failure(f"the worker {reason_of(answer)}")
        elif answer.status >= _CLIENTS_FAULT:
            self.refused.note(answer.status, reason_of(answer))
        await reply(send, answer.status, answer.headers, answer.body)
        return _Told(answer.status, is_lost)

    async def _refuse(self, exc: ServiceError, receive: Receive, send: Send) -> _Told:
        """Answer with a failure of the gateway's own."""
        status, after_s = status_of(exc), RETRY_AFTER_S.get(type(exc))
        retry = [(b"retry-after", b"%d" % after_s)] if after_s is not None else []
        is_lost = not isinstance(exc, RequestError)
        if not is_lost:
            self.dispatcher.counts.refused += 1
            self.refused.note(status, str(exc))
        else:
            self._note_failure(str(exc))
        if isinstance(exc, RequestError | Overloaded):  # its body may not have been read
            await reply_unread(receive, send, status, str(exc), *retry)
        else:
            await reply_json(send, status, {"detail": str(exc)}, *retry)
        return _Told(status, is_lost)

    def _note_failure(self, cause: str) -> None:
        self.dispatcher.counts.failed += 1
        self.crashes.note_failure(cause)
        logger.error("request failed cause=%s", cause)


def _dispatcher(gateway: Gateway, command: Sequence[str]) -> Dispatcher:
    return Dispatcher(
        command,
        gateway.settings.model_dump_json(),
        limit=gateway.settings.concurrency,
        crashes=gateway.crashes,
        metrics=gateway.metrics,
        slow_jobs=gateway.troubles.slow_jobs,
    )


async def _follow(gateway: Gateway, receive: Receive, send: Send) -> None:
    """The lifespan protocol: up at once, down when the worker is gone."""
    await receive()
    async with gateway.running():
        await send({"type": "lifespan.startup.complete"})
        await receive()
    await send({"type": "lifespan.shutdown.complete"})
