"""What the service remembers between two starts: small JSON documents in one folder.

Each document has a version of its own. An older one is read by its owner; a newer one is refused,
never overwritten. Knows nothing of what is kept.
"""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from immich_ml_metal.errors import ServiceError
from immich_ml_metal.system.disk import explain_write
from immich_ml_metal.system.owner import hand_over, make_folder, write_whole

_NAME = "immich-ml-metal"


class StateUnusable(ServiceError):
    """The state folder or a document in it cannot be read or written; says which and why."""


def default_folder() -> Path:
    """Where this platform keeps the state of a user's programs; `settings.state_dir` wins."""
    if sys.platform == "darwin":
        return Path("~/Library/Application Support").expanduser() / _NAME
    return Path("~/.local/state").expanduser() / _NAME


class StateDamaged(StateUnusable):
    """A document is there and is not what was written: it may be set aside."""


class StateNewer(StateUnusable):
    """A document was written by a newer release: it is left alone."""


class StateFolder:
    """Documents by name. Reading never creates anything; the folder is made at the first write."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, name: str, version: int) -> dict[str, Any] | None:
        """The document `name`, or None where there is none yet. Any: what JSON holds.

        Raises:
            StateUnusable: it cannot be read, is damaged, or was written by a newer release.
        """
        path = self._path(name)
        try:
            document = json.loads(path.read_bytes())
            found = document["version"]
        except FileNotFoundError:
            return None
        except OSError as exc:
            raise StateUnusable(f"cannot read {path}: {exc.strerror}") from exc
        except (ValueError, TypeError, KeyError, RecursionError) as exc:
            raise StateDamaged(f"{path} is damaged ({exc}); delete it to start afresh") from exc
        if not isinstance(document, dict) or not isinstance(found, int):
            raise StateDamaged(f"{path} is damaged (no version); delete it to start afresh")
        if found > version:
            raise StateNewer(
                f"{path} was written by a newer release (version {found}, this one reads {version})"
            )
        return document

    def write(self, name: str, version: int, document: Mapping[str, Any]) -> None:
        """Replace the document `name` as a whole: a power cut leaves the old or the new one.

        Raises:
            StateUnusable: the folder cannot be written, the disk is full, or a newer release wrote
                what is there.
        """
        path = self._path(name)
        try:
            self.read(name, version)
        except StateNewer:
            raise
        except StateUnusable:  # what is damaged may be replaced, and the rest fails again below
            pass
        text = json.dumps({"version": version, **document}, indent=1, sort_keys=True)
        try:
            write_whole(path, text.encode(), is_private=True)
        except OSError as exc:
            raise StateUnusable(explain_write(exc, path, "ML_STATE_DIR")) from exc

    def change(
        self, name: str, version: int, change: Callable[[dict[str, Any]], dict[str, Any]]
    ) -> None:
        """Read, change and write the document `name`; only one process may own a document.

        Raises:
            StateUnusable: as `read` and `write`.
        """
        self.write(name, version, change(self.read(name, version) or {}))

    def open_lock(self, name: str) -> IO[bytes]:
        """The file `name`.lock, to be locked by whoever opens it; it stays.

        Raises:
            StateUnusable: the folder cannot be written.
        """
        path = self.path / f"{name}.lock"
        try:
            make_folder(self.path)
            is_new = not path.exists()
            lock = path.open("ab")
            if is_new:
                hand_over(lock.fileno(), self.path)
        except OSError as exc:
            raise StateUnusable(explain_write(exc, path, "ML_STATE_DIR")) from exc
        return lock

    def set_aside(self, name: str) -> None:
        """Rename a damaged document, so that a new one can be begun and somebody may look at it.

        Raises:
            StateUnusable: the folder cannot be written.
        """
        path = self._path(name)
        try:
            path.replace(path.with_suffix(".damaged"))
        except OSError as exc:
            raise StateUnusable(explain_write(exc, path, "ML_STATE_DIR")) from exc

    def _path(self, name: str) -> Path:
        return self.path / f"{name}.json"
