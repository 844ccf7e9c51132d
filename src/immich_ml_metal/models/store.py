"""The model store: what is on disk, and bringing what is missing.

Safe for several threads and several processes on one folder. A file appears under its name only
when it is whole and its digest has been checked.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from immich_ml_metal.catalog import ModelSpec, find_model
from immich_ml_metal.errors import DownloadFailed, ModelUnavailable
from immich_ml_metal.models.file_lock import hold, patiently
from immich_ml_metal.models.manifest import FileRecord, describe_file, load_manifest, save_manifest
from immich_ml_metal.models.paddle import find_in_wheel
from immich_ml_metal.models.progress import DownloadProgress, Downloads, Listener, Tracker
from immich_ml_metal.models.remote import Retry
from immich_ml_metal.models.shelf import FileState, PartStatus, Shelf
from immich_ml_metal.settings import Settings
from immich_ml_metal.system.disk import explain_write
from immich_ml_metal.types import ModelFiles, ModelKey, Part, Task

if TYPE_CHECKING:
    from immich_ml_metal.models.download import Download

logger = logging.getLogger(__name__)

# Told of every download at its end: whether it brought everything, and the bytes received.
OnDownload = Callable[[bool, int], None]


class ModelStore:
    """Finds models on disk and downloads those that are not."""

    def __init__(
        self,
        settings: Settings,
        *,
        retry: Retry | None = None,
        on_download: OnDownload = lambda _is_whole, _received_bytes: None,
    ) -> None:
        """`on_download` is called on the thread that downloads."""
        self._settings = settings
        self._retry = retry or Retry()
        self._on_download = on_download
        self._downloads = Downloads()
        self.shelf = Shelf(settings.models_dir.expanduser(), settings.model_revision)

    def locate(self, key: ModelKey) -> ModelFiles | None:
        """Where a half lies, if it is whole on disk or in the rapidocr wheel. No network.

        Raises:
            UnknownModel: the catalogue has no such model.
        """
        spec = find_model(key.name, key.task, key.part)
        if self.shelf.status(spec, key.part).is_usable:
            return self.shelf.files(key)
        return self._find_elsewhere(spec, key)

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
        if files is None:
            if what := self.shelf.unreadable_of(key):
                raise ModelUnavailable(f"model {key} cannot be read: {what}; chown or chmod it")
            self._fetch(key, listener)
            files = self.shelf.files(key)
        return files

    def status(self, key: ModelKey, *, digests: bool = False) -> PartStatus:
        """What is here of one half; with `digests`, after reading every byte of it. No network.

        Raises:
            UnknownModel: the catalogue has no such model.
        """
        spec = find_model(key.name, key.task, key.part)
        status = self.shelf.status(spec, key.part, digests=digests)
        if status.is_usable or self._find_elsewhere(spec, key) is None:
            return status
        older = _older_detector(key)
        shared = None if older is None else self.status(older)
        if shared is not None and shared.is_usable:
            return replace(status, elsewhere=shared.state)
        return replace(status, elsewhere=FileState.VERIFIED)

    def verify(self, key: ModelKey, *, online: bool = False) -> PartStatus:
        """Read every file of a half and compare digests; remember what was found intact.

        Args:
            key: which half.
            online: ask the source about files placed by hand; those that are the official ones
                count as verified from then on.

        Raises:
            UnknownModel: the catalogue has no such model.
            ModelUnavailable, DownloadFailed: the source did not answer.
        """
        status = self.status(key, digests=True)
        records = {}
        if online and FileState.UNVERIFIED in status.files.values():
            records = self._official_records(key, status)
        intact = [path for path, state in status.files.items() if state is FileState.VERIFIED]
        if intact or records:
            self._remember(key, intact, records)
        return self.status(key, digests=True) if records else status

    def repair(self, key: ModelKey, listener: Listener | None = None) -> bool:
        """Check every digest of a half and fetch only what is damaged or missing anew.

        Returns:
            Whether anything was fetched.

        Raises:
            UnknownModel, ModelUnavailable, DownloadFailed: as `ensure`.
        """
        if self.status(key, digests=True).is_usable:
            return False
        self._fetch(key, listener, digests=True)
        return True

    def downloads(self) -> tuple[DownloadProgress, ...]:
        """The running downloads, oldest first."""
        return self._downloads.snapshot()

    def close(self) -> None:
        """End running downloads soon; what was received stays for the next time."""
        self._downloads.close()

    def _find_elsewhere(self, spec: ModelSpec, key: ModelKey) -> ModelFiles | None:
        """The same file under an older name, or in the installed rapidocr wheel."""
        older = _older_detector(key)
        if older is not None and (files := self.locate(older)) is not None:
            return files
        if self._settings.model_revision == "main" or self._settings.offline:
            return find_in_wheel(spec, key.part)
        return None

    def _fetch(self, key: ModelKey, listener: Listener | None, *, digests: bool = False) -> None:
        spec = find_model(key.name, key.task, key.part)
        if self._settings.offline:
            state = self.shelf.status(spec, key.part, digests=digests).state
            raise ModelUnavailable(self._how_to_place(spec, key, state))
        with self._downloads.track(key, listener) as tracker, self._alone(key, tracker):
            if self.shelf.status(spec, key.part, digests=digests).is_usable:
                return  # whoever held the lock has brought it
            is_whole = False
            try:
                self._download(spec, key, tracker, digests=digests).run()
                is_whole = True
            finally:
                self._on_download(is_whole, tracker.received_bytes)

    def _download(
        self, spec: ModelSpec, key: ModelKey, tracker: Tracker, *, digests: bool = False
    ) -> "Download":
        # brings an HTTP library, which a worker that finds its models does without
        from immich_ml_metal.models.download import Download

        return Download(self._settings, self.shelf, spec, key, tracker, self._retry, digests)

    def _official_records(self, key: ModelKey, status: PartStatus) -> dict[str, FileRecord]:
        """Records for the files placed by hand that are the official ones."""
        spec, root = find_model(key.name, key.task, key.part), self.shelf.root(key)
        listing = self._download(spec, key, Tracker(key)).list_files()
        placed = {path for path, state in status.files.items() if state is FileState.UNVERIFIED}
        return {
            file.path: describe_file(root / file.path, listing.source, listing.revision)
            for file in listing.files
            if file.path in placed and file.matches(root / file.path)
        }

    def _remember(self, key: ModelKey, intact: list[str], records: dict[str, FileRecord]) -> None:
        root = self.shelf.root(key)
        lock = self.shelf.lock_path(key, "manifest")
        try:
            with hold(lock, wait=patiently):
                known = load_manifest(root).touched(dict.fromkeys(intact, time.time()))
                save_manifest(root, known.with_files(records))
        except OSError as exc:  # a read-only folder can be checked all the same
            logger.info("not remembered: %s", explain_write(exc, root, "ML_MODELS_DIR"))

    @contextmanager
    def _alone(self, key: ModelKey, tracker: Tracker) -> Iterator[None]:
        """Hold the half's lock; the system frees it if this process dies."""
        path = self.shelf.lock_path(key, key.part)
        with ExitStack() as stack:
            try:
                stack.enter_context(hold(path, wait=tracker.wait))
            except OSError as exc:
                raise DownloadFailed(explain_write(exc, path, "ML_MODELS_DIR")) from exc
            yield

    def _how_to_place(self, spec: ModelSpec, key: ModelKey, state: FileState) -> str:
        """What a person can do about a model that is not here."""
        found = "damaged" if state is FileState.DAMAGED else "not on disk"
        return (
            f"model {key} is {found} and downloads are switched off; fetch "
            f"{self._settings.model_organization}/{spec.name} with "
            f"`immich-ml-metal models pull {spec.name}` on a connected machine and copy "
            f"{self.shelf.root(key)}, so that {self.shelf.files(key).graph} exists"
        )


def _older_detector(key: ModelKey) -> ModelKey | None:
    """Where servers before 3.3 kept the detector that all languages share."""
    if key.task is Task.OCR and key.part is Part.DETECTION and "__" in key.name:
        return ModelKey(key.task, key.part, key.name.partition("__")[2])
    return None
