"""Immich's documented HTTP API, as far as machine learning is concerned.

Needs the key of an admin with the permissions systemConfig.read, job.read and job.create.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import httpx
from pydantic import SecretStr

from immich_ml_metal.errors import ConfigError, ServiceError
from immich_ml_metal.setting_kinds import hide_passwords
from immich_ml_metal.system.network_settings import explain
from immich_ml_metal.types import FACE_MIN_SCORE, QUEUES, TEXT_MAX_RESOLUTION

TIMEOUT_S = 10.0
DUPLICATES = "duplicateDetection"  # Immich's own work on what smart search found
PERMISSIONS = ("systemConfig.read", "job.read", "job.create")
_SHAPE = (KeyError, TypeError, ValueError, AttributeError)  # of JSON that is not as we know it
_BUSY = "already running"  # in the 400 to a start of a queue that works


class ImmichError(ServiceError):
    """The Immich server cannot be reached, or does not let us."""


class KeyRefused(ImmichError):
    """It knows no such key, or the key lacks a permission."""


class QueueBusy(ImmichError):
    """The queue works, so nothing can be started in it now."""


@dataclass(frozen=True, slots=True)
class QueueCounts:
    """Jobs of one queue."""

    active: int
    waiting: int
    failed: int
    is_paused: bool

    @property
    def is_idle(self) -> bool:
        """Whether nothing is in it."""
        return not self.active and not self.waiting


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
    models: Mapping[str, str]
    concurrency: Mapping[str, int]
    version: str = ""
    face_min_score: float = FACE_MIN_SCORE
    text_max_resolution: int = TEXT_MAX_RESOLUTION
    availability_checks: bool = True


class ImmichApi:
    """A client that never shows its key."""

    def __init__(self, url: str, key: SecretStr, *, client: httpx.Client | None = None) -> None:
        """`url` is what a browser uses (http://nas:2283), with or without /api."""
        self._address = url.rstrip("/").removesuffix("/api")
        self.url = hide_passwords(self._address)  # for messages
        self._key = key
        self._client = client or _open_client()

    def __repr__(self) -> str:
        return f"<ImmichApi {self.url}>"

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def settings(self, timeout_s: float = TIMEOUT_S) -> ServerSettings:
        """What the server is set to.

        Raises:
            ImmichError: it cannot be reached, refuses the key, or answers something unknown.
        """
        config = self._ask("GET", "/api/system-config", timeout_s=timeout_s)
        version = self._ask("GET", "/api/server/version", timeout_s=timeout_s)
        try:
            return parse_settings(config, _version(version))
        except _SHAPE as exc:
            raise ImmichError(f"{self.url} has settings of an unknown shape: {exc!r}") from exc

    def queues(self, timeout_s: float = TIMEOUT_S) -> dict[str, QueueCounts]:
        """The queues that this server has, by task, and `DUPLICATES`.

        Raises:
            ImmichError: as for `settings`.
        """
        answer = self._ask("GET", "/api/jobs", timeout_s=timeout_s)
        names = {**QUEUES, DUPLICATES: DUPLICATES}
        try:
            found = {task: answer.get(name) for task, name in names.items()}
            return {task: _parse_queue(queue) for task, queue in found.items() if queue is not None}
        except _SHAPE as exc:
            raise ImmichError(f"{self.url} has queues of an unknown shape: {exc!r}") from exc

    def start_missing(self, task: str) -> None:
        """Queue every asset that has no result of `task` (or of `DUPLICATES`) yet.

        Raises:
            QueueBusy: it works; what it does not work on stays missing.
            ImmichError: as for `settings`.
        """
        self._command(task, "start", TIMEOUT_S)

    def pause(self, task: str, timeout_s: float = TIMEOUT_S) -> None:
        """Let no further job of `task` begin. A paused queue stays so until it is resumed.

        Raises:
            ImmichError: as for `settings`.
        """
        self._command(task, "pause", timeout_s)

    def resume(self, task: str, timeout_s: float = TIMEOUT_S) -> None:
        """Let the jobs of `task` go on.

        Raises:
            ImmichError: as for `settings`.
        """
        self._command(task, "resume", timeout_s)

    def _command(
        self, task: str, command: Literal["start", "pause", "resume"], timeout_s: float
    ) -> None:
        body = {"command": command, "force": False}
        self._ask("PUT", f"/api/jobs/{QUEUES.get(task, task)}", body, timeout_s=timeout_s)

    def _ask(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        timeout_s: float,
    ) -> Any:
        headers = {"x-api-key": self._key.get_secret_value(), "Accept": "application/json"}
        try:
            reply = self._client.request(
                method, self._address + path, headers=headers, json=body, timeout=timeout_s
            )
        except (httpx.HTTPError, httpx.InvalidURL) as exc:
            raise ImmichError(f"cannot reach Immich at {self.url}: {type(exc).__name__}") from exc
        except UnicodeEncodeError:  # its words hold the key, so they are not passed on
            raise KeyRefused("the API key for Immich has letters that no key has") from None
        if refusal := _refusal(reply.status_code, method, path):
            raise KeyRefused(f"Immich at {self.url} refuses the API key for {path}: {refusal}")
        if reply.status_code == httpx.codes.BAD_REQUEST and _BUSY in reply.text:
            raise QueueBusy(f"{path.rpartition('/')[2]} is busy: Immich starts nothing in it now")
        if not reply.is_success:
            raise ImmichError(f"Immich at {self.url} answered {reply.status_code} to {path}")
        try:
            return reply.json() if reply.content else {}
        except ValueError as exc:
            raise ImmichError(f"{self.url}{path} is not Immich's API") from exc


def _refusal(status: int, method: str, path: str) -> str:
    """What the key lacks, going by what was asked; empty when it was let in."""
    if status == httpx.codes.UNAUTHORIZED:
        return f"no such key (401); make one with {', '.join(PERMISSIONS[:2])} and {PERMISSIONS[2]}"
    if status != httpx.codes.FORBIDDEN:
        return ""
    lacking = "systemConfig.read" if "system-config" in path else "job.read"
    lacking = "job.create" if method == "PUT" else lacking
    return f"it lacks {lacking}, or is not an admin's (403)"


def _version(answer: Mapping[str, Any]) -> str:
    parts = [answer.get(part) for part in ("major", "minor", "patch")]
    return ".".join(str(part) for part in parts) if all(p is not None for p in parts) else ""


def _open_client() -> httpx.Client:
    try:
        return httpx.Client(timeout=TIMEOUT_S)
    except (ImportError, OSError, ValueError) as exc:  # a proxy or certificate of the environment
        raise ImmichError(f"Immich cannot be asked: {explain(exc)}") from exc


def connect(url: str | None, key: SecretStr | None) -> ImmichApi:
    """A client from the settings.

    Raises:
        ConfigError: the address or the key is missing.
        ImmichError: a network variable is wrong.
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
    sections = {"clip": "clip", "facial-recognition": "facialRecognition", "ocr": "ocr"}
    found = {task: learning[name] for task, name in sections.items() if name in learning}
    jobs = config.get("job", {})
    faces, ocr = found.get("facial-recognition", {}), found.get("ocr", {})
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
        face_min_score=float(faces.get("minScore", FACE_MIN_SCORE)),
        text_max_resolution=int(ocr.get("maxResolution", TEXT_MAX_RESOLUTION)),
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
