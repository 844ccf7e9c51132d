"""Our own service: what a running one says of itself, and one of our own while a command runs."""

import contextlib
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import IO, Any

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from immich_ml_metal.errors import ServiceError
from immich_ml_metal.settings import Settings

TIMEOUT_S = 3.0
LOST_FROM_STATUS = 500  # a 4xx is the fault of what was sent
_ANY_HOST = frozenset({"0.0.0.0", "::", "[::]", ""})
_REQUESTS = "immich_ml_http_requests_total"
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


def ask_health(url: str) -> OwnHealth:
    """Who answers at `url`.

    Raises:
        NotServing: nobody, or something that is not a machine-learning service.
    """
    try:
        root = _get(url, "/")
        if root.json().get("message") != GREETING:
            raise NotServing(f"something else than a machine-learning service answers at {url}")
        reply = _get(url, "/health")
        health = reply.json() if reply.is_success else {}
    except (httpx.HTTPError, httpx.InvalidURL) as exc:
        raise NotServing(f"nothing answers at {url}: {type(exc).__name__}") from exc
    except (ValueError, AttributeError) as exc:
        raise NotServing(
            f"something else than a machine-learning service answers at {url}"
        ) from exc
    return OwnHealth(_version(health), _engines(health), health)


def answers_by_status(url: str) -> Counter[int]:
    """How many `/predict` requests were answered with which status since the start.

    Raises:
        NotServing: `/metrics` cannot be read.
    """
    try:
        reply = _get(url, "/metrics")
        samples = [s for f in text_string_to_metric_families(reply.text) for s in f.samples]
    except (httpx.HTTPError, ValueError) as exc:
        raise NotServing(f"no metrics at {url}: {type(exc).__name__}") from exc
    counts: Counter[int] = Counter()
    for sample in samples:
        if sample.name == _REQUESTS and sample.labels.get("path") == "/predict":
            counts[int(sample.labels["status"])] += int(sample.value)
    return counts


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


def _get(url: str, path: str) -> httpx.Response:
    return httpx.get(url + path, timeout=TIMEOUT_S, trust_env=False)


class ServiceDidNotStart(ServiceError):
    """The service ended or stayed silent; the message carries its last words."""


@dataclass(frozen=True, slots=True)
class OwnService:
    """A service that this command started: its address and its process."""

    url: str
    pid: int

    def resident_bytes(self) -> int:
        """Resident memory of the service's processes."""
        process = psutil.Process(self.pid)
        total = 0
        for member in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                total += member.memory_info().rss
        return total


@contextlib.contextmanager
def running_service(
    options: Mapping[str, str], *, start_timeout_s: float = 60.0
) -> Iterator[OwnService]:
    """Run `immich-ml-metal serve` with `options` (`{"--models-dir": ...}`) on loopback.

    Raises:
        ServiceDidNotStart: it did not answer `/ping` in time.
    """
    port = _free_port()
    arguments = [part for pair in options.items() for part in pair if part]
    command = [sys.executable, "-m", "immich_ml_metal", "serve", "--host", "127.0.0.1"]
    command += ["--index-guard", "off"]  # nothing of it goes into an index
    with tempfile.TemporaryFile("w+") as words:
        process = subprocess.Popen(
            [*command, "--port", str(port), *arguments], stdout=words, stderr=subprocess.STDOUT
        )
        try:
            _wait_until_up(process, port, start_timeout_s, words)
            yield OwnService(f"http://127.0.0.1:{port}", process.pid)
        finally:
            process.terminate()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_until_up(
    process: "subprocess.Popen[bytes]", port: int, timeout_s: float, words: IO[str]
) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"http://127.0.0.1:{port}/ping", timeout=2, trust_env=False).is_success:
                return
        time.sleep(0.05)
    words.seek(0)
    raise ServiceDidNotStart(f"the service did not start: {words.read()[-2000:]}")
