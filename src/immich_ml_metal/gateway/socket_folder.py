"""The folder of the workers' sockets: private to this user, its path short, there when needed."""

import shutil
import tempfile
from pathlib import Path

_TMP_PATH_MAX = 60


class SocketFolder:
    """A temporary folder for the length of a block, made at the first use.

    macOS removes temporary folders that were empty for three days, systemd after ten; without a new
    one no worker would start again. Goes when both leave the folders of running programs alone.
    """

    def __init__(self) -> None:
        self._path: Path | None = None

    def __enter__(self) -> "SocketFolder":
        return self

    def __exit__(self, *_: object) -> None:
        if self._path is not None:
            shutil.rmtree(self._path, ignore_errors=True)

    def find(self) -> Path:
        """The folder, made anew under another name when it is gone.

        Raises:
            OSError: no temporary folder can be written.
        """
        if self._path is None or not self._path.is_dir():
            self._path = Path(tempfile.mkdtemp(prefix="immich-ml-", dir=_parent()))
        return self._path


def _parent() -> str | None:
    """Where it lies; None is the system's temporary folder.

    A socket's path has at most 104 bytes on macOS. A temporary folder that is itself gone, as one
    inside another program's may be, is replaced as well.
    """
    system = Path(tempfile.gettempdir())
    return None if len(str(system)) <= _TMP_PATH_MAX and system.is_dir() else "/tmp"
