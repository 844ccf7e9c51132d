"""What our own running service says of itself: `/health` and `/metrics`, read over HTTP."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from immich_ml_metal.errors import ServiceError
from immich_ml_metal.immich.requeue import LOST_FROM_STATUS
from immich_ml_metal.settings import Settings

TIMEOUT_S = 3.0
START_TIMEOUT_S = 60.0  # of a worker
_ANY_HOST = frozenset({"0.0.0.0", "::", "[::]", ""})
GREETING = "Immich ML"  # what `GET /` answers, here and in the official service


class NotServing(ServiceError):
    """Nothing answers where our service should be."""


@dataclass(frozen=True, slots=True)
class OwnHealth:
    """Who answers.

    Attributes:
        version: ours; empty for the official service, which has no `/health`.
        engines: `clip/visual` → `mlx`.
        raw: the whole answer.
    """

    version: str
    engines: Mapping[str, str] = field(default_factory=dict)
    raw: Mapping[str, Any] = field(default_factory=dict)


def local_url(settings: Settings) -> str:
    """Where this machine reaches its own service."""
    host = "127.0.0.1" if settings.host in _ANY_HOST else settings.host.strip("[]")
    return f"http://[{host}]:{settings.port}" if ":" in host else f"http://{host}:{settings.port}"


def ask_health(url: str, client: httpx.Client | None = None) -> OwnHealth:
    """Who answers at `url`.

    Raises:
        NotServing: nobody, or something that is not a machine-learning service.
    """
    try:
        root = _get(url, "/", client)
        if root.json().get("message") != GREETING:
            raise NotServing(f"something else than a machine-learning service answers at {url}")
        reply = _get(url, "/health", client)
        health = reply.json() if reply.is_success else {}
    except (httpx.HTTPError, httpx.InvalidURL) as exc:
        raise NotServing(f"nothing answers at {url}: {type(exc).__name__}") from exc
    except (ValueError, AttributeError) as exc:
        raise NotServing(
            f"something else than a machine-learning service answers at {url}"
        ) from exc
    return OwnHealth(_version(health), _engines(health), health)


def failed_answers(url: str, client: httpx.Client | None = None) -> int:
    """How many `/predict` answers were failures of ours since the start.

    Raises:
        NotServing: `/metrics` cannot be read.
    """
    try:
        reply = _get(url, "/metrics", client)
        samples = [s for f in text_string_to_metric_families(reply.text) for s in f.samples]
    except (httpx.HTTPError, ValueError) as exc:
        raise NotServing(f"no metrics at {url}: {type(exc).__name__}") from exc
    return sum(
        int(sample.value)
        for sample in samples
        if sample.name == "immich_ml_http_requests_total"
        and sample.labels.get("path") == "/predict"
        and int(sample.labels.get("status", 0)) >= LOST_FROM_STATUS
    )


def _version(health: Mapping[str, Any]) -> str:
    """The worker alone says `version`, the gateway `versions.service`."""
    versions = health.get("versions")
    nested = versions.get("service") if isinstance(versions, dict) else None
    return str(health.get("version") or nested or "")


def _engines(health: Mapping[str, Any]) -> dict[str, str]:
    """The engine table; the gateway shows its worker's last `/health` under `worker.health`."""
    node: Any = health
    for step in ("worker", "health"):
        if "engines" not in node and isinstance(node.get(step), dict):
            node = node[step]
    table = node.get("engines")
    return {str(k): str(v) for k, v in table.items()} if isinstance(table, dict) else {}


def wake_worker(url: str) -> None:
    """Make a gateway start its worker, which may be stopped for being idle; nothing is loaded.

    Raises:
        NotServing: there is no answer.
    """
    try:
        httpx.post(
            f"{url}/predict",
            data={"entries": "{}", "text": "x"},
            timeout=START_TIMEOUT_S,
            trust_env=False,
        )
    except httpx.HTTPError as exc:
        raise NotServing(f"the worker behind {url} does not start: {type(exc).__name__}") from exc


def _get(url: str, path: str, client: httpx.Client | None) -> httpx.Response:
    if client is not None:
        return client.get(url + path)
    return httpx.get(url + path, timeout=TIMEOUT_S, trust_env=False)
