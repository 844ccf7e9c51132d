"""The public face: takes requests in, holds them until the worker has answered, is always there.

Knows nothing about models, pictures or what a request asks for.
"""

import asyncio
import contextlib
import logging
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any

from immich_ml_metal.errors import (
    RETRY_AFTER_S,
    ConfigError,
    Overloaded,
    RequestError,
    ServiceError,
    status_of,
)
from immich_ml_metal.gateway.admission import ClientGone, Reception, make_reception
from immich_ml_metal.gateway.companions import Companions, make_companions
from immich_ml_metal.gateway.crashes import CrashRecord
from immich_ml_metal.gateway.dispatcher import Dispatcher
from immich_ml_metal.gateway.health import Parts, report
from immich_ml_metal.gateway.history import History
from immich_ml_metal.gateway.holding import Holding
from immich_ml_metal.gateway.http import Message, Receive, Send, reply, reply_json, reply_unread
from immich_ml_metal.gateway.page import Page, is_foreign, redirect, send_to_page
from immich_ml_metal.gateway.qualifier import COMMAND as CHECK_COMMAND
from immich_ml_metal.gateway.qualifier import Qualifier
from immich_ml_metal.gateway.supervisor import Order, WorkerState
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
_HEAD_BYTES = 4096
_ASK_TIMEOUT_S = 0.25  # what `/health` and `/metrics` wait for the worker's part


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
        self.dispatcher = _dispatcher(settings, command, self.crashes, self.metrics)
        reception = reception or make_reception(settings.max_image_size_bytes)
        self.holding = Holding(self.dispatcher, reception, hold_limit_s=settings.hold_limit_s)
        self.watch = Watch(settings, self.dispatcher)
        self.qualifier = self._make_qualifier(check_command)
        self.companions = companions or make_companions(settings, self.metrics)
        self.history = History()
        self._page = Page(settings, self.history, self._describe_engines, port=lambda: self.port)
        self._pages = self._make_pages()
        self._feed_gauges()

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
            asyncio.create_task(self.companions.run()),
            asyncio.create_task(self.qualifier.run()),
        ]
        for task in tasks:
            task.add_done_callback(self._task_ended)
        self.dispatcher.expect()
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

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
        is_for_people = scope["query_string"] == b"pretty" or send_to_page(dict(scope["headers"]))
        self._page.note_models(bool((self.watch.health or {}).get("models")))
        await reply_json(send, 200, report(parts), indent=2 if is_for_people else None)

    async def _metrics_page(self, scope: Scope, receive: Receive, send: Send) -> None:
        parts = {"gateway": self.metrics.render()}
        if (worker := await self.watch.ask_metrics(_ASK_TIMEOUT_S)) is not None:
            parts["worker"] = worker
        await reply(send, 200, [(b"content-type", CONTENT_TYPE.encode())], merge(parts))

    async def _predict(self, headers: Mapping[bytes, bytes], receive: Receive, send: Send) -> None:
        self.open_requests += 1
        self.dispatcher.counts.received += 1
        upload = _Upload(receive)
        status: int | None = None
        started_s = time.monotonic()
        self.companions.begin()
        try:
            status = await self._hold(headers, upload, send)
        finally:
            self.open_requests -= 1
            self.companions.end(upload.head, status)
            self.history.note(upload.head, status, time.monotonic() - started_s)

    async def _hold(
        self, headers: Mapping[bytes, bytes], receive: Receive, send: Send
    ) -> int | None:
        """Answer one `/predict`; the status that was sent, None when nobody is left to read it."""
        counts = self.dispatcher.counts
        try:
            answer = await self.holding.answer(headers, receive, request_id.get() or "")
        except ClientGone:
            counts.cancelled += 1
            return None
        except ServiceError as exc:
            return await self._refuse(exc, receive, send)
        counts.answered += 1
        if answer.status >= 500:
            self._note_failure(f"the worker answered {answer.status}")
        await reply(send, answer.status, answer.headers, answer.body)
        return answer.status

    def _describe_engines(self) -> Mapping[str, Any]:
        """Slot → engine and verdict, as the worker told last."""
        engines = (self.watch.last_health or {}).get("engines", {})
        return {slot: {"engine": engine} for slot, engine in engines.items()}

    async def _refuse(self, exc: ServiceError, receive: Receive, send: Send) -> int:
        status, after_s = status_of(exc), RETRY_AFTER_S.get(type(exc))
        retry = [(b"retry-after", b"%d" % after_s)] if after_s is not None else []
        if isinstance(exc, RequestError):
            self.dispatcher.counts.refused += 1
        else:
            self._note_failure(str(exc))
        if isinstance(exc, RequestError | Overloaded):  # its body may not have been read
            await reply_unread(receive, send, status, str(exc), *retry)
        else:
            await reply_json(send, status, {"detail": str(exc)}, *retry)
        return status

    def _note_failure(self, cause: str) -> None:
        self.dispatcher.counts.failed += 1
        self.crashes.note_failure(cause)
        logger.error("request failed cause=%s", cause)


class _Upload:
    """Passes an upload through and remembers how it begins: `entries` is the first part."""

    def __init__(self, receive: Receive) -> None:
        self.head = b""
        self._receive = receive

    async def __call__(self) -> Message:
        message = await self._receive()
        self.head += message.get("body", b"")[: _HEAD_BYTES - len(self.head)]
        return message


def _dispatcher(
    settings: Settings, command: Sequence[str], crashes: CrashRecord, metrics: Metrics
) -> Dispatcher:
    return Dispatcher(
        command,
        settings.model_dump_json(),
        limit=settings.concurrency,
        crashes=crashes,
        metrics=metrics,
    )


async def _follow(gateway: Gateway, receive: Receive, send: Send) -> None:
    """The lifespan protocol: up at once, down when the worker is gone."""
    await receive()
    async with gateway.running():
        await send({"type": "lifespan.startup.complete"})
        await receive()
    await send({"type": "lifespan.shutdown.complete"})
