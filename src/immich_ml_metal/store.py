"""The model store: what is on disk, and bringing what is missing.

Safe for several threads and several processes on one folder. A file appears under its name only
when it is whole and its digest has been checked.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from filelock import FileLock, Timeout

from immich_ml_metal.catalog import ModelSpec, find_model
from immich_ml_metal.config import Settings
from immich_ml_metal.download import Download
from immich_ml_metal.errors import DownloadFailed, ModelUnavailable
from immich_ml_metal.progress import DownloadProgress, Downloads, Listener, Tracker
from immich_ml_metal.rapidocr_wheel import find_in_wheel
from immich_ml_metal.shelf import Shelf, check_part, is_usable
from immich_ml_metal.transfer import Retry, explain_os_error
from immich_ml_metal.types import ModelFiles, ModelKey, Part, Task

logger = logging.getLogger(__name__)

_LOCK_POLL_S = 0.5


class ModelStore:
    """Finds models on disk and downloads those that are not."""

    def __init__(self, settings: Settings, *, retry: Retry | None = None) -> None:
        self._settings = settings
        self._retry = retry or Retry()
        self._downloads = Downloads()
        self.shelf = Shelf(settings.models_dir.expanduser(), settings.model_revision)

    def locate(self, key: ModelKey) -> ModelFiles | None:
        """Where a half lies, if it is whole on disk or in the rapidocr wheel. No network.

        Raises:
            UnknownModel: the catalogue has no such model.
        """
        spec = find_model(key.name, key.task, key.part)
        if is_usable(check_part(self.shelf.root(key), spec, key.part)):
            return self.shelf.files(key)
        older = _older_detector(key)
        if older is not None and (files := self.locate(older)) is not None:
            return files
        if self._settings.model_revision == "main" or self._settings.offline:
            return find_in_wheel(spec, key.part)
        return None

    def ensure(self, key: ModelKey, listener: Listener | None = None) -> ModelFiles:
        """Where a half lies, downloading what is missing of it first. Blocks.

        Args:
            key: which half.
            listener: told of the progress, from the downloading threads.

        Raises:
            UnknownModel: the catalogue has no such model.
            ModelUnavailable: it is not here and cannot be fetched.
            DownloadFailed: fetching failed; what was received is kept for the next try.
        """
        files = self.locate(key)
        if files is not None:
            return files
        spec = find_model(key.name, key.task, key.part)
        if self._settings.offline:
            raise ModelUnavailable(self._how_to_place(spec, key))
        with self._downloads.track(key, listener) as tracker, self._alone(key, tracker):
            files = self.locate(key)  # whoever held the lock may have brought it
            if files is not None:
                return files
            Download(self._settings, self.shelf, spec, key, tracker, self._retry).run()
        return self.shelf.files(key)

    def downloads(self) -> tuple[DownloadProgress, ...]:
        """The running downloads, oldest first."""
        return self._downloads.snapshot()

    def close(self) -> None:
        """End running downloads soon; what was received stays for the next time."""
        self._downloads.close()

    @contextmanager
    def _alone(self, key: ModelKey, tracker: Tracker) -> Iterator[None]:
        """Hold the half's lock; the system frees it if this process dies."""
        path = self.shelf.lock_path(key, key.part)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = _acquire(FileLock(path), tracker)
        except OSError as exc:
            raise DownloadFailed(explain_os_error(exc, path)) from exc
        try:
            yield
        finally:
            lock.release()

    def _how_to_place(self, spec: ModelSpec, key: ModelKey) -> str:
        """What a person can do about a model that is not here."""
        return (
            f"model {key} is not on disk and downloads are switched off; fetch "
            f"{self._settings.model_organization}/{spec.name} with "
            f"`immich-ml-metal models pull {spec.name}` on a connected machine and copy "
            f"{self.shelf.root(key)}, so that {self.shelf.files(key).graph} exists"
        )


def _acquire(lock: FileLock, tracker: Tracker) -> FileLock:
    try:
        lock.acquire(timeout=0)
    except Timeout:
        tracker.wait()
    while not lock.is_locked:
        tracker.raise_if_stopped()
        try:
            lock.acquire(timeout=_LOCK_POLL_S, poll_interval=_LOCK_POLL_S / 10)
        except Timeout:
            continue
    return lock


def _older_detector(key: ModelKey) -> ModelKey | None:
    """Where servers before 3.3 kept the detector that all languages share."""
    if key.task is Task.OCR and key.part is Part.DETECTION and "__" in key.name:
        return ModelKey(key.task, key.part, key.name.partition("__")[2])
    return None
