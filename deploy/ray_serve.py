"""The worker behind Ray Serve: replicas on several machines, one address for Immich.

    pip install 'immich-ml-metal[ray]'
    serve run --address auto ray_serve:service        # in this folder

Each replica is the ordinary worker app with its own models; Ray places the replicas, checks their
health, restarts them and updates them one after the other. The front has the port: it gives each
request to a replica, again to another one when that one dies, and adds their metrics up.

Settings come from the environment of the Ray workers (`ML_*`), or from the TOML file that
ML_CONFIG_FILE names there; REPLICAS is how many there are. Every machine needs the models on
its own disk, or reaches the hub.
"""

import asyncio
import os
import uuid
from contextlib import AsyncExitStack

import httpx
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import Response

from immich_ml_metal.logs import configure_logging
from immich_ml_metal.metrics import merge
from immich_ml_metal.settings_sources import load_settings
from immich_ml_metal.worker.compose import build_app

HEALTH_PERIOD_S = 10
HEALTH_TIMEOUT_S = 30
# Immich gives up after 300 s; a replica that is replaced first answers what it has.
DRAIN_S = 130
# Enough to form batches, and few enough that the other replicas get their share.
REQUESTS_PER_REPLICA = 32
REPLICAS = int(os.environ.get("REPLICAS", "1"))
TRIES = 4  # of one request, on replicas that die
PAUSE_S = 1.0  # until Ray has noticed that one died
ASKED_FOR_METRICS = 25  # times as many questions as there are replicas: Ray chooses who answers

Answer = tuple[int, dict[str, str], bytes]


@serve.deployment(
    name="immich-ml",
    num_replicas=REPLICAS,
    max_ongoing_requests=REQUESTS_PER_REPLICA,
    health_check_period_s=HEALTH_PERIOD_S,
    health_check_timeout_s=HEALTH_TIMEOUT_S,
    graceful_shutdown_timeout_s=DRAIN_S,
)
class Replica:
    """One worker. Made inside its process: threads and models cannot travel."""

    async def __init__(self) -> None:
        settings = load_settings()
        configure_logging(settings, "worker")
        app = build_app(settings)
        self._open = AsyncExitStack()
        await self._open.enter_async_context(app.router.lifespan_context(app))
        self._app = httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://replica", timeout=None
        )
        self._name = uuid.uuid4().hex[:8]

    async def ask(self, method: str, path: str, kind: str, body: bytes) -> Answer:
        """One HTTP request to the worker; `kind` is its content type."""
        answer = await self._app.request(
            method, path, content=body, headers={"content-type": kind} if kind else {}
        )
        kept = {name: answer.headers[name] for name in KEPT if name in answer.headers}
        return answer.status_code, kept, answer.content

    async def metrics(self) -> tuple[str, str]:
        """Its name, and its series as text."""
        return self._name, (await self._app.get("/metrics")).text


KEPT = ("content-type", "server-timing", "x-request-id", "retry-after")


@serve.deployment(name="immich-ml-front", max_ongoing_requests=1000)
class Front:
    """What Immich speaks to."""

    def __init__(self, replicas: DeploymentHandle) -> None:
        self._replicas = replicas

    async def __call__(self, request: Request) -> Response:
        """Answer one request of Immich."""
        if request.url.path == "/metrics":
            return Response(await self._metrics(), media_type="text/plain; version=0.0.4")
        kind = request.headers.get("content-type", "")
        words = (request.method, request.url.path, kind, await request.body())
        for attempt in range(TRIES):
            try:
                status, headers, content = await self._replicas.ask.remote(*words)
            except RayTaskError:  # of the replica itself, which lives
                raise
            except RayActorError:
                if attempt + 1 == TRIES:
                    raise
                await asyncio.sleep(PAUSE_S)
                continue
            return Response(content, status, headers)
        raise AssertionError("unreachable")

    async def _metrics(self) -> bytes:
        """Those of every replica that lives, each under a `process` of its own."""
        found: dict[str, str] = {}
        for _ in range(ASKED_FOR_METRICS * REPLICAS):
            if len(found) == REPLICAS:
                break
            try:
                name, text = await self._replicas.metrics.remote()
            except RayActorError:
                continue
            found[f"replica-{name}"] = text
        return merge(found)


service = Front.bind(Replica.bind())
