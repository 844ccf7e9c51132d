import logging
import threading
from collections.abc import Mapping

import numpy as np
import pytest
from doubles.engines import PATIENCE_S, Gate

from immich_ml_metal.backends.ort.adaptive import PATIENCE, AdaptiveGraph, CoreLoad
from immich_ml_metal.errors import InferenceError, LoadFailed
from immich_ml_metal.types import Tensor


class Opened:
    """Opens graphs that answer with their number of threads."""

    def __init__(self) -> None:
        self.threads: list[int] = []
        self.broken = False
        self.closed = 0
        self.error: Exception | None = None

    def __call__(self, threads: int) -> "Session":
        if self.broken:
            raise LoadFailed("no memory")
        self.threads.append(threads)
        return Session(threads, self)


class Session:
    inputs, outputs = (), ()
    metadata: Mapping[str, str] = {}
    max_batch, fixed_shapes, size_bytes = 1, False, 5

    def __init__(self, threads: int, owner: Opened) -> None:
        self._threads, self._owner = threads, owner

    def run(self, feeds: Mapping[str, Tensor]) -> list[Tensor]:
        if self._owner.error is not None:
            raise self._owner.error
        return [np.array(self._threads)]

    def close(self) -> None:
        self._owner.closed += 1


def run(graph: AdaptiveGraph, times: int = 1) -> int:
    return [int(graph.run({})[0]) for _ in range(times)][-1]


def test_a_lone_caller_keeps_all_cores() -> None:
    opened = Opened()
    graph = AdaptiveGraph(opened, CoreLoad(), cores=4)
    assert run(graph, 5 * PATIENCE) == 4
    assert opened.threads == [4]


def test_callers_side_by_side_soon_get_one_core_each_and_a_lone_one_all_again() -> None:
    opened, load = Opened(), CoreLoad()
    graph = AdaptiveGraph(opened, load, cores=4)
    with load.enter():  # somebody else's inference runs all the while
        assert run(graph, PATIENCE - 1) == 4
        assert run(graph) == 1
    assert graph.threads == 1
    assert run(graph, PATIENCE - 1) == 1
    assert run(graph) == 4
    assert opened.threads == [4, 1, 4]


def test_a_short_crowd_changes_nothing() -> None:
    opened, load = Opened(), CoreLoad()
    graph = AdaptiveGraph(opened, load, cores=4)
    for _ in range(5):
        with load.enter():
            run(graph, PATIENCE // 2)
        run(graph, PATIENCE // 2)
    assert opened.threads == [4]


def test_on_one_core_there_is_nothing_to_change() -> None:
    opened, load = Opened(), CoreLoad()
    graph = AdaptiveGraph(opened, load, cores=1)
    with load.enter():
        assert run(graph, 3 * PATIENCE) == 1
    assert opened.threads == [1]


def test_a_session_that_cannot_be_changed_stays_and_is_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    opened, load = Opened(), CoreLoad()
    graph = AdaptiveGraph(opened, load, cores=4)
    opened.broken = True
    with load.enter(), caplog.at_level(logging.WARNING):
        assert run(graph, PATIENCE) == 4
        assert "session not changed" in caplog.text
        opened.broken = False
        assert run(graph, PATIENCE) == 1


def test_an_inference_that_fails_is_not_counted_for_ever() -> None:
    opened, load = Opened(), CoreLoad()
    graph = AdaptiveGraph(opened, load, cores=4)
    opened.error = InferenceError("bad")
    for _ in range(2 * PATIENCE):
        with pytest.raises(InferenceError):
            graph.run({})
    opened.error = None
    assert run(graph, 2 * PATIENCE) == 4


def test_only_one_of_many_callers_changes_the_session() -> None:
    opened, load, gate = Opened(), CoreLoad(), Gate()
    graph = AdaptiveGraph(opened, load, cores=2)

    def work() -> None:
        gate.pass_through()
        for _ in range(3 * PATIENCE):
            with load.enter():
                run(graph)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    gate.open()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert opened.threads == [2, 1]


def test_what_the_file_says_and_its_end_are_passed_on() -> None:
    opened = Opened()
    graph = AdaptiveGraph(opened, CoreLoad(), cores=2)
    assert (graph.max_batch, graph.fixed_shapes, graph.size_bytes) == (1, False, 5)
    graph.close()
    assert opened.closed == 1
