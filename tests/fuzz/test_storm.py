"""A whole service, gateway and worker, under mutated requests."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from doubles.whole_service import Beside, health, whole_service, worker_ends
from fuzz.storm import mutated_forms, storm


def weather(port: int, kind: str, count: int, slack: float = 1.0) -> None:
    """Let a storm pass, and look at what it left; `slack` multiplies what may take how long."""
    before = health(port)
    beside = Beside(port)
    report = storm(port, kind, count, slack)
    beside.end()
    after = health(port)
    pings = sorted(beside.pings)
    ping_p99_s = pings[int(len(pings) * 0.99)]
    slowest_search_s = max([took_s for _, took_s in beside.searches], default=0)
    grown = after["gateway"]["memory_bytes"] - before["gateway"]["memory_bytes"]
    sys.stdout.write(
        f"\n    {count} {kind}: {dict(report.statuses)}, slowest {report.slowest_s:.2f} s; beside "
        f"them: /ping p99 {ping_p99_s * 1e3:.0f} ms, slowest search {slowest_search_s:.2f} s; "
        f"gateway {grown / 2**20:+.1f} MB\n"
    )
    assert report.bad == []
    assert sum(report.statuses.values()) == count
    assert {status for status, _ in beside.searches} <= {200}
    assert slowest_search_s < 1.5 * slack
    assert ping_p99_s < 0.1 * slack
    assert after["worker"]["pid"] == before["worker"]["pid"]
    assert worker_ends(after) == worker_ends(before) == 0
    assert grown < 20 * 2**20


@pytest.fixture(scope="module")
def port(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with whole_service(models, tmp_path_factory.mktemp("service")) as port:
        yield port


@pytest.mark.parametrize(("kind", "count"), [("forms", 600), ("pictures", 300), ("heads", 400)])
def test_no_mutated_request_is_a_failure_a_delay_or_a_restart(
    port: int, kind: str, count: int
) -> None:
    weather(port, kind, count, slack=10)  # other tests run beside it


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("kind", "count"), [("forms", 100_000), ("pictures", 20_000), ("heads", 50_000)]
)
def test_nor_are_a_hundred_thousand(port: int, kind: str, count: int) -> None:
    weather(port, kind, count)


def test_the_same_seed_makes_the_same_requests() -> None:
    first, again, other = (mutated_forms(seed) for seed in (1, 1, 2))
    one, two, three = ([next(made) for _ in range(50)] for made in (first, again, other))
    assert one == two != three
