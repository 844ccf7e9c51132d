"""The worker process: the service's app on a unix socket, for as long as its parent lives.

The parent writes the settings as one line of JSON to standard input and keeps that pipe open; when
it closes, by whatever death of the parent, this process ends too. Knows nothing about models.
"""

import contextlib
import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import psutil
import uvicorn

from immich_ml_metal.system.accepting import AcceptingServer
from immich_ml_metal.system.listen import KEEPALIVE_S, SERVER_OPTIONS, listen, listen_on_path

if TYPE_CHECKING:
    from immich_ml_metal.settings import Settings

STDIN = 0
EXIT_BAD_SETTINGS = 2
_KEEPALIVE_S = 5  # the gateway opens one connection per request; only a debugger keeps one


def read_settings(fd: int = STDIN) -> bytes:
    """Read the line of JSON that the parent sends first."""
    line = bytearray()
    while not line.endswith(b"\n"):  # unbuffered, so that a thread may wait on the descriptor later
        if not (chunk := os.read(fd, 65_536)):
            sys.exit("immich-ml-metal: the gateway went away before it sent the settings")
        line += chunk
    return bytes(line)


class _Server(AcceptingServer):
    """uvicorn that lets the process end with status 0 when it was asked to end.

    uvicorn would repeat the signal after its tidy end: that kills the process before the libraries
    of the models are left, so that a crash of theirs there would never be seen. Goes when uvicorn
    returns instead.
    """

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Finish what runs; a second Ctrl-C does not wait for it."""
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True


def serve(app: Any, socket: Path, *, parent_fd: int = STDIN) -> None:
    """Serve the ASGI `app` on `socket` until SIGTERM or until `parent_fd` reaches its end."""
    threading.Thread(target=_end_with_parent, args=(parent_fd, socket), daemon=True).start()
    config = uvicorn.Config(app, **SERVER_OPTIONS, timeout_keep_alive=_KEEPALIVE_S)
    _Server(config).run(sockets=[listen_on_path(socket)])


def run(settings: "Settings") -> None:
    """Serve the worker app alone on the public port, without a gateway (`serve --no-gateway`)."""
    from immich_ml_metal.system.allocator import limit_arenas
    from immich_ml_metal.worker.compose import build_app

    limit_arenas()
    config = uvicorn.Config(
        build_app(settings, start=_name_start(os.getpid())),
        **SERVER_OPTIONS,
        timeout_keep_alive=KEEPALIVE_S,
        timeout_graceful_shutdown=int(settings.drain_limit_s),
    )
    _Server(config).run(sockets=listen(settings.host, settings.port))


def main() -> None:
    """`python -m immich_ml_metal.worker.process SOCKET`: started by the gateway only."""
    from immich_ml_metal.errors import ConfigError
    from immich_ml_metal.logs import configure_logging
    from immich_ml_metal.settings import Settings
    from immich_ml_metal.system.allocator import limit_arenas
    from immich_ml_metal.worker.compose import build_app

    limit_arenas()
    settings = Settings.model_validate_json(read_settings())
    configure_logging(settings, "worker")
    try:
        app = build_app(settings, start=_name_start(os.getppid()))  # the gateway's
    except ConfigError as exc:  # the last line of this process; the gateway ends at this status
        print(f"immich-ml-metal: {exc}", file=sys.stderr)  # noqa: T201
        sys.exit(EXIT_BAD_SETTINGS)
    serve(app, Path(sys.argv[1]))


def _name_start(pid: int) -> str:
    """Name the life of a process: numbers come again, times do not."""
    return f"{pid} {psutil.Process(pid).create_time():.2f}"


def _end_with_parent(fd: int, socket: Path) -> None:
    while os.read(fd, 65_536):
        pass
    # Nobody is left to read an answer, and the model libraries may be anywhere: no tidy exit.
    with contextlib.suppress(OSError):
        socket.unlink()
        socket.parent.rmdir()
    if os.getpgrp() == os.getpid():  # takes helper processes of the worker along
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(1)


if __name__ == "__main__":
    main()
