"""One inference on all cores when it is alone, one per core when there are several.

Under load, single-threaded inferences side by side do a tenth more work than inferences that share
all cores, and sessions that fight for cores do least; a lone request wants all cores. A session's
thread count is fixed when it is opened, so a graph changes its session when the load has changed
for a while. Only one is kept: two would map the weights twice.
"""

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from immich_ml_metal.errors import Busy, LoadFailed, OutOfMemory
from immich_ml_metal.types import Graph, Tensor

log = logging.getLogger(__name__)

PATIENCE = 8  # inferences of the other kind before the session is changed


class CoreLoad:
    """Counts the inferences that run now, of all graphs of one class of work."""

    def __init__(self) -> None:
        self._running = 0
        self._lock = threading.Lock()

    @contextmanager
    def enter(self) -> Iterator[bool]:
        """Count one inference for the length of the block; yields whether it started alone."""
        with self._lock:
            self._running += 1
            alone = self._running == 1
        try:
            yield alone
        finally:
            with self._lock:
                self._running -= 1


class AdaptiveGraph:
    """A graph that is open on all cores or on one. `run` may be called from several threads."""

    def __init__(self, open_graph: Callable[[int], Graph], load: CoreLoad, *, cores: int) -> None:
        """`open_graph(threads)` opens the same file for so many threads."""
        self._open_graph = open_graph
        self._load = load
        self._cores = cores
        self._lock = threading.Lock()
        self._is_wide = cores > 1  # the first request after a start is mostly a lone search
        self._against = 0  # inferences in a row, more or less, that wanted the other session
        self._is_changing = False
        self._graph = open_graph(cores)
        self.inputs, self.outputs = self._graph.inputs, self._graph.outputs
        self.metadata = self._graph.metadata
        self.max_batch, self.fixed_shapes = self._graph.max_batch, self._graph.fixed_shapes
        self.size_bytes = self._graph.size_bytes

    @property
    def threads(self) -> int:
        """Threads of the session that is open."""
        return self._cores if self._is_wide else 1

    def run(self, feeds: Mapping[str, Tensor]) -> list[Tensor]:
        """Compute every output, after changing the session if the load has changed."""
        with self._load.enter() as alone:
            if self._notice(alone=alone):
                self._change()
            return self._graph.run(feeds)

    def _notice(self, *, alone: bool) -> bool:
        """Count one inference; say whether this caller is to change the session."""
        if self._cores == 1:
            return False
        with self._lock:
            self._against = max(0, self._against + (1 if alone != self._is_wide else -1))
            if self._against < PATIENCE or self._is_changing:
                return False
            self._is_changing = True
            return True

    def _change(self) -> None:
        """Open the other session; inferences that run on the old one finish there."""
        threads = 1 if self._is_wide else self._cores
        try:
            graph = self._open_graph(threads)
        except (LoadFailed, OutOfMemory, Busy) as exc:  # the old session is as right, only slower
            log.warning("session not changed: threads=%d reason=%s", threads, exc)
            graph = self._graph
        with self._lock:
            self._is_wide = (threads > 1) if graph is not self._graph else self._is_wide
            self._graph = graph
            self._against = 0
            self._is_changing = False

    def close(self) -> None:
        """Free the session."""
        self._graph.close()
