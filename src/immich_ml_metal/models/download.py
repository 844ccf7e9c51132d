"""Bring one half of a model to disk: list its files, fetch what is missing, install them together.

The caller holds the half's lock. Nothing is written in place.
"""

import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import httpx2

from immich_ml_metal.catalog import Family, ModelSpec
from immich_ml_metal.errors import DownloadFailed
from immich_ml_metal.models.file_lock import hold, patiently
from immich_ml_metal.models.manifest import describe_file, load_manifest, save_manifest
from immich_ml_metal.models.paddle import list_pinned
from immich_ml_metal.models.progress import Tracker
from immich_ml_metal.models.remote import (
    Listing,
    RemoteFile,
    Retry,
    require_space,
)
from immich_ml_metal.models.shelf import GRAPH, FileState, Shelf, check_part
from immich_ml_metal.models.transfer import Transfer, Transient, network, partial_path, pause
from immich_ml_metal.setting_kinds import format_bytes
from immich_ml_metal.settings import Settings
from immich_ml_metal.system.disk import explain_write
from immich_ml_metal.system.network_settings import network_troubles
from immich_ml_metal.types import ModelKey

logger = logging.getLogger(__name__)

PARALLEL_FILES = 4  # M-CLIP keeps its weights in some 390 files; one by one the round trips add up
SPARE_BYTES = 64 * 2**20  # left free on the disk beyond the download itself
_GOOD = (FileState.VERIFIED, FileState.UNVERIFIED)


@dataclass(frozen=True, slots=True)
class Download:
    """One half of one model, from its source to its place.

    Attributes:
        digests: compare digests, not only sizes, to find what is damaged on disk.
    """

    settings: Settings
    shelf: Shelf
    spec: ModelSpec
    key: ModelKey
    tracker: Tracker
    retry: Retry
    digests: bool = False

    def run(self) -> None:
        """Fetch and install what is missing.

        Raises:
            ModelUnavailable: the source does not have it or does not let us have it.
            DownloadFailed: every try failed; what was received stays for the next time.
        """
        listing = self.list_files()
        wanted = self._missing(listing)
        staging = self.shelf.staging(self.key)
        started = time.monotonic()
        try:
            staging.mkdir(parents=True, exist_ok=True)
            self._begin(wanted, staging)
            self._fetch_all(wanted, staging)
            self._install(listing, wanted, staging)
        except OSError as exc:
            raise DownloadFailed(explain_write(exc, staging, "ML_MODELS_DIR")) from exc
        logger.info("downloaded model=%s seconds=%.1f", self.key, time.monotonic() - started)

    def list_files(self) -> Listing:
        """The half's files at their source.

        Raises:
            ModelUnavailable: there is no such model.
            DownloadFailed: the source does not answer.
        """
        if self.spec.family is Family.PADDLE and self.settings.model_revision == "main":
            return list_pinned(self.spec, self.key.part, self.settings.modelscope_endpoint)
        with network(f"no list of files for {self.key}"):
            return self._patiently(self._open_hub())

    def _open_hub(self) -> Callable[[], Listing]:
        if troubles := network_troubles():  # the hub's library prints and fails at its import
            raise DownloadFailed("; ".join(troubles))
        from immich_ml_metal.models.hub import Hub  # it takes a second: only where it is asked

        hub = Hub(
            self.settings.model_organization,
            self.settings.model_revision,
            self.settings.hub_endpoint,
            self.settings.download_timeout_s,
        )
        return lambda: hub.list_files(self.spec, self.key.part)

    def _patiently(self, ask: Callable[[], Listing]) -> Listing:
        failures = 0
        while True:
            try:
                return ask()
            except Transient as exc:
                failures += 1
                if failures >= self.retry.attempts:
                    raise DownloadFailed(f"no list of files for {self.key}: {exc}") from exc
                pause(exc, failures, self.retry, self.tracker)

    def _missing(self, listing: Listing) -> tuple[RemoteFile, ...]:
        """The listed files that are not usable as they are on disk."""
        root = self.shelf.root(self.key)
        states = check_part(root, self.spec, self.key.part, digests=self.digests)
        if states[f"{self.key.part}/{GRAPH}"] in _GOOD:  # it tells which side files belong to it
            return tuple(f for f in listing.files if states.get(f.path, _GOOD[0]) not in _GOOD)
        return tuple(
            file
            for file in listing.files
            if states.get(file.path) not in _GOOD
            and (file.path in states or not (root / file.path).exists())
        )

    def _begin(self, wanted: tuple[RemoteFile, ...], staging: Path) -> None:
        guess = self.spec.part_bytes[self.key.part]
        total = sum(file.size_bytes or guess for file in wanted)
        present = sum(_present_bytes(file, staging) for file in wanted)
        require_space(staging, total - present + SPARE_BYTES)
        self.tracker.begin(total, present)
        logger.info(
            "downloading model=%s files=%d size=%s present=%s into=%s",
            self.key,
            len(wanted),
            format_bytes(total),
            format_bytes(present),
            self.shelf.root(self.key),
        )

    def _fetch_all(self, wanted: tuple[RemoteFile, ...], staging: Path) -> None:
        timeout = httpx2.Timeout(self.settings.download_timeout_s)
        with network("cannot open a connection"):
            made = httpx2.Client(timeout=timeout, follow_redirects=True)
        with (
            made as client,
            ThreadPoolExecutor(PARALLEL_FILES, thread_name_prefix="download") as threads,
        ):
            transfer = Transfer(client, self.retry, self.tracker)
            jobs = [
                threads.submit(transfer.fetch, file, staging / file.path)
                for file in sorted(wanted, key=lambda file: file.size_bytes or 0, reverse=True)
            ]
            try:
                for job in as_completed(jobs):
                    job.result()
            except BaseException:  # also Ctrl-C: the first failure ends the half's other files
                self.tracker.stop()
                threads.shutdown(wait=True, cancel_futures=True)
                if transfer.met_full_disk:  # that hurts more than starting again
                    for file in wanted:
                        partial_path(file, staging / file.path).unlink(missing_ok=True)
                raise

    def _install(self, listing: Listing, wanted: tuple[RemoteFile, ...], staging: Path) -> None:
        """Record the staged files and rename them into place, the graph last.

        Ended in between, the next start finds files missing and takes them from the staging folder.
        """
        root = self.shelf.root(self.key)
        records = {
            file.path: describe_file(
                staging / file.path, listing.source, listing.revision, sha256=file.sha256
            )
            for file in wanted
        }
        with hold(self.shelf.lock_path(self.key, "manifest"), wait=patiently):
            save_manifest(root, load_manifest(root).with_files(records))
        for file in sorted(wanted, key=lambda file: file.path.endswith(GRAPH)):
            (root / file.path).parent.mkdir(parents=True, exist_ok=True)
            (staging / file.path).replace(root / file.path)


def _present_bytes(file: RemoteFile, staging: Path) -> int:
    for path in (staging / file.path, partial_path(file, staging / file.path)):
        if path.exists():
            return path.stat().st_size
    return 0
