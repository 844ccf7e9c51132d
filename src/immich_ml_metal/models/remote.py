"""What is to be fetched, how patiently, and whether the disk takes it. Knows no network.

Apart from `transfer`, whose HTTP library costs a worker that downloads nothing 3 MB.
"""

import random
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from immich_ml_metal.errors import DownloadFailed
from immich_ml_metal.models.manifest import git_sha1_of, sha256_of
from immich_ml_metal.setting_kinds import format_bytes


@dataclass(frozen=True, slots=True)
class Retry:
    """How patient a download is.

    Attributes:
        attempts: consecutive tries that bring no new byte before giving up.
        first_wait_s: pause after the first failure; doubled after each further one.
        max_wait_s: the longest pause, unless the server asks for more.
    """

    attempts: int = 6
    first_wait_s: float = 1.0
    max_wait_s: float = 30.0

    def wait_s(self, failures: int) -> float:
        """The pause after so many failures in a row, spread so that many clients do not meet."""
        ceiling = min(self.max_wait_s, self.first_wait_s * 2.0 ** (failures - 1))
        return ceiling * (0.75 + random.random() / 4)


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file of a model as its source describes it.

    Attributes:
        path: relative to the model's folder, with forward slashes.
        size_bytes: None where the source does not say; then the answer's Content-Length counts.
        sha256, git_sha1: at least one is given.
    """

    path: str
    url: str
    size_bytes: int | None
    sha256: str | None = None
    git_sha1: str | None = None
    headers: Mapping[str, str] | None = None

    @property
    def digest(self) -> str:
        """The digest that names this content."""
        return self.sha256 or self.git_sha1 or ""

    def matches(self, path: Path) -> bool:
        """Whether the file at `path` has the digest."""
        return (sha256_of(path) if self.sha256 else git_sha1_of(path)) == self.digest


@dataclass(frozen=True, slots=True)
class Listing:
    """The files of one half at one revision."""

    source: str
    revision: str
    files: tuple[RemoteFile, ...]


def require_space(folder: Path, needed_bytes: int) -> None:
    """Refuse a download that cannot fit.

    Raises:
        DownloadFailed: less than `needed_bytes` are free where `folder` lies.
    """
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise DownloadFailed(
            f"not enough disk space at {folder}: {format_bytes(needed_bytes)} needed, "
            f"{format_bytes(free)} free; free some space or set ML_MODELS_DIR"
        )
