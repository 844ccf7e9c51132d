import math
import re
from itertools import pairwise
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from immich_ml_metal.metrics import Metrics, merge


def parse(text: str | bytes) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    text = text if isinstance(text, str) else text.decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def one(
    values: dict[tuple[str, tuple[tuple[str, str], ...]], float], name: str, **labels: str
) -> float:
    return values[name, tuple(sorted(labels.items()))]


def test_a_stage_is_timed_under_its_task() -> None:
    metrics = Metrics()
    with metrics.stage("clip", "infer"):
        pass
    values = parse(metrics.render())
    assert one(values, "immich_ml_stage_seconds_count", task="clip", stage="infer") == 1
    assert 0 < one(values, "immich_ml_stage_seconds_sum", task="clip", stage="infer") < 5


def test_a_stage_that_raises_is_timed_as_well() -> None:
    metrics = Metrics()
    with pytest.raises(ValueError, match="bad"), metrics.stage("ocr", "decode"):
        raise ValueError("bad")
    values = parse(metrics.render())
    assert one(values, "immich_ml_stage_seconds_count", task="ocr", stage="decode") == 1


def test_two_metrics_share_nothing() -> None:
    first, second = Metrics(), Metrics()
    first.faces.inc(3)
    assert one(parse(first.render()), "immich_ml_faces_found_total") == 3
    assert one(parse(second.render()), "immich_ml_faces_found_total") == 0


def test_the_queue_depth_is_read_at_the_scrape() -> None:
    metrics, queue = Metrics(), [1, 2]
    metrics.watch_queue("gpu", lambda: len(queue))
    queue.append(3)
    assert one(parse(metrics.render()), "immich_ml_queue_depth", device="gpu") == 3


def test_memory_and_version_are_always_there() -> None:
    values = parse(Metrics().render())
    assert one(values, "immich_ml_memory_bytes") > 2**20
    assert one(values, "immich_ml_info", version="0.1.0") == 1


def test_a_process_shows_only_what_it_feeds() -> None:
    gateway, worker = Metrics("gateway"), Metrics("worker")
    worker.worker_up.set(1)  # harmless, though nobody sees it
    gateway_names = {name for name, _ in parse(gateway.render())}
    worker_names = {name for name, _ in parse(worker.render())}
    everything = {name for name, _ in parse(Metrics().render())}
    assert gateway_names | worker_names == everything
    both = {name.removeprefix("immich_ml_") for name in gateway_names & worker_names}
    assert both == {"in_flight", "memory_bytes", "info"}


def test_every_instrument_is_fed_somewhere() -> None:
    folder = Path(__file__).parents[1] / "src" / "immich_ml_metal"
    source = "\n".join(path.read_text() for path in folder.rglob("*.py"))
    names = [name for name, value in vars(Metrics()).items() if hasattr(value, "describe")]
    fed = {name for name in names if re.search(rf"\.{name}\.(labels|inc|dec|set|observe)", source)}
    assert len(names) > 15
    assert sorted(set(names) - fed) == []


def test_merging_keeps_both_processes_apart() -> None:
    gateway, worker = Metrics(), Metrics()
    gateway.http_requests.labels("/predict", "200").inc(2)
    worker.requests.labels("clip", "200").inc(5)
    gateway.faces.inc()
    worker.faces.inc(7)
    values = parse(merge({"gateway": gateway.render(), "worker": worker.render()}))
    assert one(values, "immich_ml_faces_found_total", process="gateway") == 1
    assert one(values, "immich_ml_faces_found_total", process="worker") == 7
    clip = {"task": "clip", "status": "200", "process": "worker"}
    assert one(values, "immich_ml_requests_total", **clip) == 5


def test_each_family_is_announced_once() -> None:
    text = merge({"gateway": Metrics().render(), "engine": Metrics().render()}).decode()
    headers = [line for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(headers) == len(set(headers)) > 15
    assert "_created" not in text


def test_a_merged_histogram_is_cumulative_and_complete() -> None:
    engine = Metrics()
    for seconds in (0.002, 0.2, 2.0):
        engine.stage_seconds.labels("clip", "infer").observe(seconds)
    families = {
        family.name: family
        for family in text_string_to_metric_families(merge({"worker": engine.render()}).decode())
    }
    histogram = families["immich_ml_stage_seconds"]
    counts = [s.value for s in histogram.samples if s.name.endswith("_bucket")]
    assert histogram.type == "histogram"
    assert all(a <= b for a, b in pairwise(counts))
    assert counts[-1] == 3
    assert math.isclose(next(s.value for s in histogram.samples if s.name.endswith("_sum")), 2.202)


def test_text_that_is_not_an_exposition_is_refused() -> None:
    with pytest.raises(ValueError, match=r"."):
        merge({"engine": "{nonsense"})
