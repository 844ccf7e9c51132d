"""A stand-in for an Immich server, built from its documented API and from what 3.1.0 does.

Its queues burn: a job whose answer is not a 2xx, or that finds nobody listening, is gone for good,
and no counter shows it. Paused queues keep their jobs. Only a "missing" run asks again.
"""

import asyncio
import contextlib
import copy
import json
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

KEY = "an-admin-key"
ALL_PERMISSIONS = frozenset({"systemConfig.read", "job.read", "job.create"})

CONFIG: dict[str, Any] = {
    "job": {
        "smartSearch": {"concurrency": 2},
        "faceDetection": {"concurrency": 2},
        "ocr": {"concurrency": 1},
        "thumbnailGeneration": {"concurrency": 3},
    },
    "machineLearning": {
        "enabled": True,
        "urls": ["http://mac.local:3003"],
        "availabilityChecks": {"enabled": True, "timeout": 2000, "interval": 30000},
        "clip": {"enabled": True, "modelName": "ViT-B-32__openai"},
        "duplicateDetection": {"enabled": True, "maxDistance": 0.01},
        "facialRecognition": {
            "enabled": True,
            "modelName": "buffalo_l",
            "minScore": 0.7,
            "maxDistance": 0.5,
            "minFaces": 3,
        },
        "ocr": {
            "enabled": True,
            "modelName": "PP-OCRv5_mobile",
            "minDetectionScore": 0.5,
            "minRecognitionScore": 0.8,
            "maxResolution": 736,
        },
    },
}
# queue → its task, the part of the settings that names its model, its two halves
FEEDS = {
    "smartSearch": ("clip", "clip", ("visual",)),
    "faceDetection": ("facial-recognition", "facialRecognition", ("detection", "recognition")),
    "ocr": ("ocr", "ocr", ("detection", "recognition")),
}
_IDLE_S = 0.005
_JOB_S = 0.02  # what Immich does beside the answer: reads the preview, writes the row
_BOUNDARY = "----formdata-undici-0123456789"


@dataclass
class Queue:
    """Jobs are numbers of assets."""

    waiting: deque[int] = field(default_factory=deque)
    active: int = 0
    failed: int = 0
    is_paused: bool = False
    rows: set[int] = field(default_factory=set)
    lost: int = 0

    def counts(self) -> dict[str, Any]:
        held = len(self.waiting)
        waiting, paused = (0, held) if self.is_paused else (held, 0)
        zero = {"completed": 0, "delayed": 0}
        numbers = {"active": self.active, "failed": self.failed}
        numbers |= {"waiting": waiting, "paused": paused}
        status = {"isActive": self.active > 0, "isPaused": self.is_paused}
        return {"jobCounts": zero | numbers, "queueStatus": status}


class ImmichDouble:
    """Serve `app` with its lifespan and the queues work; without, they only have numbers."""

    def __init__(self, ml_url: str = "") -> None:
        self.config = copy.deepcopy(CONFIG)
        if ml_url:
            self.config["machineLearning"]["urls"] = [ml_url]
        self.assets: list[int] = []
        self.queues = {name: Queue() for name in (*FEEDS, "duplicateDetection", "library")}
        self.permissions = set(ALL_PERMISSIONS)
        self.started: list[tuple[str, dict[str, Any]]] = []
        self.commands: list[tuple[str, str]] = []
        self.hangs_s = 0.0
        self.commanded = 0  # how many commands are open now
        self.most_commanded = 0
        self.fails: dict[str, int] = {}  # `resume ocr`, or `GET`, → the status it is answered
        routes = [
            Route("/api/server/version", self.version),
            Route("/api/system-config", self.system_config),
            Route("/api/jobs", self.jobs),
            Route("/api/jobs/{name}", self.command, methods=["PUT"]),
        ]
        self.app = Starlette(routes=routes, lifespan=self._work)

    # -- what a test does and sees -----------------------------------------------------------------

    def upload(self, count: int) -> None:
        """New photos, each with a job in every queue."""
        new = range(len(self.assets), len(self.assets) + count)
        self.assets.extend(new)
        for name in FEEDS:
            self.queues[name].waiting.extend(new)

    def missing(self) -> dict[str, int]:
        """How many assets have no row, by queue."""
        return {name: len(self.assets) - len(self.queues[name].rows) for name in FEEDS}

    @property
    def lost(self) -> int:
        """Jobs that were thrown away so far."""
        return sum(queue.lost for queue in self.queues.values())

    @property
    def waiting(self) -> int:
        return sum(len(self.queues[name].waiting) for name in FEEDS)

    @property
    def paused(self) -> set[str]:
        return {name for name, queue in self.queues.items() if queue.is_paused}

    @property
    def is_idle(self) -> bool:
        return not any(queue.active or queue.waiting for queue in self.queues.values())

    # -- the queues --------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _work(self, _: Starlette) -> AsyncIterator[None]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(timeout=300, limits=limits, trust_env=False) as client:
            workers = [
                asyncio.create_task(self._work_on(name, client))
                for name in FEEDS
                for _ in range(self.config["job"][name]["concurrency"])
            ]
            yield
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)

    async def _work_on(self, name: str, client: httpx.AsyncClient) -> None:
        queue = self.queues[name]
        while True:
            if queue.is_paused or not queue.waiting:
                await asyncio.sleep(_IDLE_S)
                continue
            asset = queue.waiting.popleft()
            queue.active += 1
            try:
                await asyncio.sleep(_JOB_S)
                if await self._ask(name, asset, client):
                    queue.rows.add(asset)
                else:
                    queue.lost += 1
            finally:
                queue.active -= 1

    async def _ask(self, name: str, asset: int, client: httpx.AsyncClient) -> bool:
        task, section, parts = FEEDS[name]
        model = self.config["machineLearning"][section]["modelName"]
        entries = json.dumps({task: {part: {"modelName": model} for part in parts}})
        body = "\r\n".join(
            [
                *(f"--{_BOUNDARY}", 'Content-Disposition: form-data; name="entries"', "", entries),
                *(f"--{_BOUNDARY}", 'Content-Disposition: form-data; name="image"; filename="b"'),
                *("", f"asset {asset}", f"--{_BOUNDARY}--", ""),
            ]
        )
        kind = {"content-type": f"multipart/form-data; boundary={_BOUNDARY}"}
        for url in self.config["machineLearning"]["urls"]:
            with contextlib.suppress(httpx.HTTPError):
                answer = await client.post(f"{url}/predict", content=body, headers=kind)
                if answer.is_success:
                    return True
        return False

    # -- the API -----------------------------------------------------------------------------------

    async def version(self, _: Request) -> Response:
        return JSONResponse({"major": 3, "minor": 1, "patch": 0})

    async def system_config(self, request: Request) -> Response:
        refusal = await self.refusal(request, "systemConfig.read")
        return refusal or JSONResponse(self.config)

    async def jobs(self, request: Request) -> Response:
        if refusal := await self.refusal(request, "job.read"):
            return refusal
        return JSONResponse({name: queue.counts() for name, queue in self.queues.items()})

    async def command(self, request: Request) -> Response:
        self.commanded += 1
        self.most_commanded = max(self.most_commanded, self.commanded)
        try:
            return await self._obey(request)
        finally:
            self.commanded -= 1

    async def _obey(self, request: Request) -> Response:
        if refusal := await self.refusal(request, "job.create"):
            return refusal
        name, body = request.path_params["name"], await request.json()
        if status := self.fails.get(f"{body['command']} {name}"):
            return JSONResponse({"message": "Internal server error"}, status)
        queue = self.queues[name]
        self.commands.append((body["command"], name))
        if body["command"] == "start":
            if queue.active:
                busy = {"message": "Job is already running", "error": "Bad Request"}
                return JSONResponse({**busy, "statusCode": 400}, 400)
            self.started.append((name, body))
            if name in FEEDS:
                queue.waiting.extend(asset for asset in self.assets if asset not in queue.rows)
        else:
            queue.is_paused = body["command"] == "pause"
        return JSONResponse(queue.counts())

    async def refusal(self, request: Request, permission: str) -> Response | None:
        asked_s = time.monotonic()
        while time.monotonic() - asked_s < self.hangs_s:
            await asyncio.sleep(_IDLE_S)
        if status := self.fails.get(request.method):
            return JSONResponse({"message": "Internal server error"}, status)
        if request.headers.get("x-api-key") != KEY:
            return JSONResponse({"message": "Invalid API key"}, 401)
        if permission not in self.permissions:
            return JSONResponse({"message": f"Missing required permission: {permission}"}, 403)
        return None
