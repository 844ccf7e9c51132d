"""The model store behind the index guard: it gives the files that made the index."""

import logging
import threading
from collections.abc import Sequence
from typing import Any

from immich_ml_metal.catalog import clean_name
from immich_ml_metal.index_guard.guard import IndexFinding, IndexGuard
from immich_ml_metal.models.progress import DownloadProgress
from immich_ml_metal.models.store import ModelStore
from immich_ml_metal.settings import Settings
from immich_ml_metal.types import ModelFiles, ModelKey, Task

log = logging.getLogger(__name__)


class GuardedStore:
    """A store whose files the guard chooses, and what the guard found. Any thread."""

    def __init__(
        self, store: ModelStore, guard: IndexGuard, settings: Settings, start: str
    ) -> None:
        """Look at once, on a thread of its own: a digest may be due, and nothing waits for it.

        `start` names this start of the service: a change is logged once in each.
        """
        self._store = store
        self._guard = guard
        self._configured = (
            f"{Task.CLIP}/{clean_name(settings.clip_model)}",
            f"{Task.FACES}/{clean_name(settings.face_model)}",
        )
        self._findings: list[IndexFinding] = []
        threading.Thread(target=self._look, args=(start,), daemon=True).start()

    def _look(self, start: str) -> None:
        self._guard.tell(start)
        self._refresh()

    def describe(self) -> list[dict[str, Any]]:
        """What was found, for `/health`."""
        return [finding.as_dict() for finding in self._findings]

    def ensure(self, key: ModelKey) -> ModelFiles:
        """The files of a model, fetched first when they are not here. Blocks."""
        files = self._guard.files(key, self._store.ensure)
        self._refresh()
        return files

    def repair(self, key: ModelKey) -> bool:
        """Fetch again what of a model is damaged; whether there was anything. Blocks."""
        return self._store.repair(key)

    def downloads(self) -> Sequence[DownloadProgress]:
        """The running downloads."""
        return self._store.downloads()

    def close(self) -> None:
        """End running downloads soon."""
        self._store.close()

    def _refresh(self) -> None:
        self._findings = self._guard.findings(self._configured)
