"""Immich's documented HTTP API, as far as machine learning is concerned.

Needs the key of an admin with the permissions systemConfig.read, job.read and job.create.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import httpx
from pydantic import SecretStr

from immich_ml_metal.errors import ConfigError, ServiceError
from immich_ml_metal.types import Task

TIMEOUT_S = 10.0
# Immich's names of the queues that ask a machine-learning service.
QUEUES: Mapping[Task, str] = MappingProxyType(
    {Task.CLIP: "smartSearch", Task.FACES: "faceDetection", Task.OCR: "ocr"}
)


class ImmichError(ServiceError):
    """The Immich server cannot be reached, or does not let us."""


@dataclass(frozen=True, slots=True)
class QueueCounts:
    """Jobs of one queue."""

    active: int
    waiting: int
    failed: int
    is_paused: bool


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """What an Immich server is set to do with a machine-learning service.

    Attributes:
        urls: where it sends requests, in order of preference.
        models: the model of each task, as configured; a task that is switched off is left out.
        concurrency: jobs of each task that it runs at once.
        version: as it says, `3.1.0`; empty when it does not.
        face_min_score: lowest face score it asks for.
        text_max_resolution: short side it asks text detection for, in pixels.
    """

    is_enabled: bool
    urls: tuple[str, ...]
    models: Mapping[Task, str]
    concurrency: Mapping[Task, int]
    version: str = ""
    face_min_score: float = 0.7
    text_max_resolution: int = 736
    availability_checks: bool = True


class ImmichApi:
    """A client that never shows its key."""

    def __init__(self, url: str, key: SecretStr, *, client: httpx.Client | None = None) -> None:
        """`url` is what a browser uses (http://nas:2283), with or without /api."""
        self.url = url.rstrip("/").removesuffix("/api")
        self._key = key
        self._client = client or httpx.Client(timeout=TIMEOUT_S)

    def __repr__(self) -> str:
        return f"<ImmichApi {self.url}>"

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def settings(self) -> ServerSettings:
        """What the server is set to.

        Raises:
            ImmichError: it cannot be reached, refuses the key, or answers something unknown.
        """
        config = self._ask("GET", "/api/system-config")
        version = self._version()
        try:
            return parse_settings(config, version)
        except (KeyError, TypeError, ValueError) as exc:
            raise ImmichError(f"{self.url} has settings of an unknown shape: {exc!r}") from exc

    def queues(self) -> dict[Task, QueueCounts]:
        """How many jobs the machine-learning queues hold.

        Raises:
            ImmichError: as for `settings`.
        """
        answer = self._ask("GET", "/api/jobs")
        try:
            return {
                task: _parse_queue(answer[name]) for task, name in QUEUES.items() if name in answer
            }
        except (KeyError, TypeError, ValueError) as exc:
            raise ImmichError(f"{self.url} has queues of an unknown shape: {exc!r}") from exc

    def start_missing(self, task: Task) -> None:
        """Queue every asset that has no result of `task` yet.

        Raises:
            ImmichError: as for `settings`.
        """
        self._ask("PUT", f"/api/jobs/{QUEUES[task]}", {"command": "start", "force": False})

    def _version(self) -> str:
        answer = self._ask("GET", "/api/server/version")
        parts = [answer.get(part) for part in ("major", "minor", "patch")]
        return ".".join(str(part) for part in parts) if all(p is not None for p in parts) else ""

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        headers = {"x-api-key": self._key.get_secret_value(), "Accept": "application/json"}
        try:
            reply = self._client.request(method, self.url + path, headers=headers, json=body)
        except (httpx.HTTPError, httpx.InvalidURL) as exc:
            raise ImmichError(f"cannot reach Immich at {self.url}: {type(exc).__name__}") from exc
        if reply.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
            raise ImmichError(
                f"Immich at {self.url} refuses the API key for {path} ({reply.status_code}): "
                "it needs an admin's key with systemConfig.read, job.read and job.create"
            )
        if not reply.is_success:
            raise ImmichError(f"Immich at {self.url} answered {reply.status_code} to {path}")
        try:
            return reply.json() if reply.content else {}
        except ValueError as exc:
            raise ImmichError(f"{self.url}{path} is not Immich's API") from exc


def connect(url: str | None, key: SecretStr | None) -> ImmichApi:
    """A client from the settings.

    Raises:
        ConfigError: the address or the key is missing.
    """
    if url is None:
        raise ConfigError("immich_url is not set (ML_IMMICH_URL=http://nas:2283)")
    if key is None:
        raise ConfigError(
            "immich_api_key is not set (ML_IMMICH_API_KEY, an Immich admin's API key)"
        )
    return ImmichApi(url, key)


def parse_settings(config: Mapping[str, Any], version: str = "") -> ServerSettings:
    """Pick what concerns us out of `GET /system-config`; older servers lack some of it."""
    learning = config["machineLearning"]
    sections = {Task.CLIP: "clip", Task.FACES: "facialRecognition", Task.OCR: "ocr"}
    found = {task: learning[name] for task, name in sections.items() if name in learning}
    jobs = config.get("job", {})
    faces, ocr = found.get(Task.FACES, {}), found.get(Task.OCR, {})
    return ServerSettings(
        is_enabled=bool(learning["enabled"]),
        urls=tuple(learning.get("urls") or filter(None, [learning.get("url")])),
        models={
            task: str(section["modelName"])
            for task, section in found.items()
            if section.get("enabled", True)
        },
        concurrency={
            task: int(jobs[queue]["concurrency"]) for task, queue in QUEUES.items() if queue in jobs
        },
        version=version,
        face_min_score=float(faces.get("minScore", 0.7)),
        text_max_resolution=int(ocr.get("maxResolution", 736)),
        availability_checks=bool(learning.get("availabilityChecks", {}).get("enabled", True)),
    )


def _parse_queue(queue: Mapping[str, Any]) -> QueueCounts:
    counts = queue["jobCounts"]
    return QueueCounts(
        active=int(counts["active"]),
        waiting=int(counts["waiting"])
        + int(counts.get("delayed", 0))
        + int(counts.get("paused", 0)),
        failed=int(counts["failed"]),
        is_paused=bool(queue["queueStatus"]["isPaused"]),
    )
