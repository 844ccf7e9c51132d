"""A stand-in for an Immich server, built from its documented API."""

import copy
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

KEY = "an-admin-key"

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


def queue(**counts: int) -> dict[str, Any]:
    zero = {"active": 0, "completed": 0, "delayed": 0, "failed": 0, "paused": 0, "waiting": 0}
    status = {"isActive": False, "isPaused": False}
    return {"jobCounts": {**zero, **counts}, "queueStatus": status}


class ImmichDouble:
    """The three endpoints with their permissions, and what was started."""

    def __init__(self) -> None:
        self.config = copy.deepcopy(CONFIG)
        self.started: list[tuple[str, dict[str, Any]]] = []
        routes = [
            Route("/api/server/version", self.version),
            Route("/api/system-config", self.system_config),
            Route("/api/jobs", self.jobs),
            Route("/api/jobs/{name}", self.command, methods=["PUT"]),
        ]
        self.app = Starlette(routes=routes)

    async def version(self, _: Request) -> Response:
        return JSONResponse({"major": 3, "minor": 1, "patch": 0})

    async def system_config(self, request: Request) -> Response:
        return self.refusal(request) or JSONResponse(self.config)

    async def jobs(self, request: Request) -> Response:
        names = {"smartSearch": queue(waiting=40, active=2), "faceDetection": queue(failed=1)}
        return self.refusal(request) or JSONResponse({**names, "ocr": queue(), "library": queue()})

    async def command(self, request: Request) -> Response:
        if refusal := self.refusal(request):
            return refusal
        self.started.append((request.path_params["name"], await request.json()))
        return JSONResponse(queue(active=1))

    def refusal(self, request: Request) -> Response | None:
        key = request.headers.get("x-api-key")
        return None if key == KEY else JSONResponse({"message": "Invalid API key"}, 401)
