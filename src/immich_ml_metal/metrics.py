"""What the service counts and times, in Prometheus' text format.

Each process owns one `Metrics` with its own registry, made by the app and handed down. The gateway
answers `/metrics` with `merge`: both processes' families side by side under a `process` label, so
that no number of one is mistaken for, or added into, a number of the other.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

import psutil
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from immich_ml_metal import __version__
from immich_ml_metal.errors import STATUS
from immich_ml_metal.types import QUEUES

CONTENT_TYPE = CONTENT_TYPE_LATEST
Process = Literal["gateway", "worker"]
Stage = Literal["read", "queue", "decode", "preprocess", "infer", "postprocess"]

# From a cached decode (1 ms) to the 300 s after which Immich's own client gives up.
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 120, 300)
# What `/predict` may be answered with.
PREDICT_STATUSES = ("200", *sorted({str(status) for status in STATUS.values()}))
_stages: ContextVar[dict[str, float] | None] = ContextVar("stages", default=None)
BATCH_ITEMS = (1, 2, 4, 8, 16, 32, 64)


@contextmanager
def own_stages() -> Iterator[dict[str, float]]:
    """Gather in one place the seconds of each stage of what the body, or its tasks, do."""
    stages: dict[str, float] = {}
    token = _stages.set(stages)
    try:
        yield stages
    finally:
        _stages.reset(token)


def note_stage(stage: Stage, seconds: float) -> None:
    """Add to the stages of the request on whose behalf this runs, if there is one."""
    if (stages := _stages.get()) is not None:
        stages[stage] = stages.get(stage, 0.0) + seconds


class Metrics:
    """The instruments of one process; callers use the attributes and give labels in order."""

    def __init__(self, process: Process | None = None) -> None:
        """`process` shows only what that process feeds; None shows all."""
        self.registry = CollectorRegistry()
        self._shown_in: CollectorRegistry | None = self.registry
        self._make_load_instruments()
        self._shown_in = self.registry if process != "gateway" else None
        self._make_request_instruments()
        self._make_model_instruments()
        self._shown_in = self.registry if process != "worker" else None
        self._make_gateway_instruments()
        self._show_zeros()
        Gauge(
            "immich_ml_memory_bytes", "Resident memory of the process.", registry=self.registry
        ).set_function(lambda: psutil.Process().memory_info().rss)
        Gauge("immich_ml_info", "1, with the version.", ["version"], registry=self.registry).labels(
            __version__
        ).set(1)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"immich_ml_{name}", text, labels, registry=self._shown_in)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"immich_ml_{name}", text, labels, registry=self._shown_in)

    def _histogram(
        self, name: str, text: str, *labels: str, buckets: tuple[float, ...] = SECONDS
    ) -> Histogram:
        return Histogram(
            f"immich_ml_{name}", text, labels, buckets=buckets, registry=self._shown_in
        )

    def _make_load_instruments(self) -> None:
        self.in_flight = self._gauge("in_flight", "Requests taken in and not answered yet.")
        self.queue_depth = self._gauge(
            "queue_depth",
            "Items waiting for a device; at the gateway, requests waiting for the worker.",
            "device",
        )

    def _make_request_instruments(self) -> None:
        self.requests = self._counter("requests", "Tasks answered by the worker.", "task", "status")
        self.stage_seconds = self._histogram(
            "stage_seconds",
            "Seconds of one stage (read, queue, decode, preprocess, infer or postprocess).",
            "task",
            "stage",
        )
        self.batch_items = self._histogram(
            "batch_items", "Items of one inference.", "model", buckets=BATCH_ITEMS
        )
        self.faces = self._counter("faces_found", "Faces found.")
        self.text_lines = self._counter("text_lines_found", "Text lines read.")
        self.fallbacks = self._counter(
            "fallbacks", "Times something ran elsewhere than planned.", "reason"
        )

    def _make_model_instruments(self) -> None:
        self.model_loads = self._counter(
            "model_loads", "Models loaded, by outcome (ok, failed).", "model", "engine", "outcome"
        )
        self.model_load_seconds = self._histogram(
            "model_load_seconds", "Seconds to load a model.", "engine"
        )
        self.model_evictions = self._counter(
            "model_evictions", "Models unloaded, by reason (idle, memory).", "reason"
        )
        self.model_bytes = self._gauge(
            "model_bytes", "Memory of each loaded model.", "model", "engine"
        )
        self.engine_failures = self._counter(
            "engine_failures",
            "Failed tries of an engine, by cause (error, invalid_output, timeout, load).",
            "engine",
            "cause",
        )
        self.downloads = self._counter(
            "downloads", "Downloads of a model's half, by outcome (ok, failed).", "outcome"
        )
        self.download_bytes = self._counter("download_bytes", "Bytes of model files fetched.")
        self.engine_info = self._gauge(
            "engine_info", "1, with each task's engine.", "task", "engine"
        )

    def _make_gateway_instruments(self) -> None:
        self.http_requests = self._counter(
            "http_requests",
            "HTTP requests answered; 5xx on /predict are lost jobs.",
            "path",
            "status",
        )
        self.http_seconds = self._histogram(
            "http_seconds", "Seconds from the first byte in to the answer.", "path"
        )
        self.worker_up = self._gauge("worker_up", "1 while the worker is serving.")
        self.worker_restarts = self._counter(
            "worker_restarts",
            "Workers that ended: crash, idle, memory, or asked for.",
            "reason",
        )
        self.replays = self._counter("replays", "Requests sent again after the worker died.")
        self.requeues = self._counter("requeues", "Times Immich was asked for its missing jobs.")
        self.paused_queues = self._gauge(
            "paused_queues", "1 while we keep this queue of Immich's paused.", "queue"
        )
        self.unplanned_end = self._gauge(
            "unplanned_end_timestamp_seconds",
            "When a start last found that the run before had not ended as planned; 0 for never.",
        )

    def _show_zeros(self) -> None:
        """Every label that an alert asks for is there from the start.

        Prometheus sees no increase in a series that begins with its first failure.
        """
        for status in PREDICT_STATUSES:
            self.http_requests.labels("/predict", status)
        for reason in ("crash", "idle", "memory"):
            self.worker_restarts.labels(reason)
        for queue in QUEUES.values():
            self.paused_queues.labels(queue)
        for outcome in ("ok", "failed"):
            self.downloads.labels(outcome)

    @contextmanager
    def stage(self, task: str, stage: Stage) -> Iterator[None]:
        """Time the body as one stage of one request; a stage that raises is timed as well."""
        started_s = time.perf_counter()
        try:
            yield
        finally:
            elapsed_s = time.perf_counter() - started_s
            self.stage_seconds.labels(task, stage).observe(elapsed_s)
            note_stage(stage, elapsed_s)

    def count_download(self, is_whole: bool, received_bytes: int) -> None:
        """Count one download that is over; any thread."""
        self.downloads.labels("ok" if is_whole else "failed").inc()
        self.download_bytes.inc(received_bytes)

    def count_fallback(self, reason: str) -> None:
        """Count one answer that came from elsewhere than planned; any thread."""
        self.fallbacks.labels(reason).inc()

    def watch_queue(self, device: str, depth: Callable[[], float]) -> None:
        """Report `depth()` as the queue depth of `device` at every scrape."""
        self.queue_depth.labels(device).set_function(depth)

    def render(self) -> str:
        """This process's numbers as Prometheus text."""
        return generate_latest(self.registry).decode()


def merge(parts: Mapping[str, str]) -> bytes:
    """One exposition out of several processes' texts.

    Args:
        parts: process name (`gateway`, `worker`) → what its `render` gave. Leave out a process
            that is not running.

    Raises:
        ValueError: a text is not in Prometheus' format.
    """
    families: dict[str, Metric] = {}
    for process, text in parts.items():
        for family in text_string_to_metric_families(text):
            if family.name.endswith("_created"):  # doubles the series and says little
                continue
            merged = families.setdefault(
                family.name, Metric(family.name, family.documentation, family.type)
            )
            merged.samples.extend(_labelled(family.samples, process))
    return generate_latest(_Families(families.values()))


def _labelled(samples: Iterable[Sample], process: str) -> Iterator[Sample]:
    for sample in samples:
        yield sample._replace(labels={"process": process, **sample.labels})


class _Families(CollectorRegistry):
    """A registry whose content is given instead of collected."""

    def __init__(self, families: Iterable[Metric]) -> None:
        super().__init__(auto_describe=False)
        self._families = tuple(families)

    def collect(self) -> Iterator[Metric]:
        """Yield the given families."""
        yield from self._families
