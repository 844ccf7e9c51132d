"""Runs the gateway: sockets, signals, and an end at which nothing accepted is left unanswered."""

import asyncio
import logging
import resource
import signal
import socket
from collections.abc import Sequence
from functools import partial
from types import FrameType

import uvicorn

from immich_ml_metal.gateway.app import WORKER_COMMAND, Gateway
from immich_ml_metal.gateway.patient import has_room, limited
from immich_ml_metal.gateway.qualifier import COMMAND as CHECK_COMMAND
from immich_ml_metal.gateway.supervisor import Order
from immich_ml_metal.settings import Settings
from immich_ml_metal.system.accepting import AcceptingServer
from immich_ml_metal.system.listen import KEEPALIVE_S, SERVER_OPTIONS, listen

logger = logging.getLogger(__name__)

# Of the drain limit, kept for ending the worker and the connections.
_END_RESERVE_S = 3.0
# A client between two requests sends its next one on its open connection within this time, and is
# told with the answer that the connection ends.
_QUIET_S = 0.5
_POLL_S = 0.05
_LOOKS = 6  # at what Immich is in the middle of; it may count what it will never send
# launchd allows 256; every held request has a connection, and a file once memory is full.
_OPEN_FILES = 8192
_OWN_FILES = 64  # listeners, pipes, logs, probes


class GatewayServer(AcceptingServer):
    """uvicorn with the gateway's signals.

    SIGTERM and SIGINT drain, a second one ends at once; SIGHUP restarts the worker when clear.
    """

    def __init__(self, gateway: Gateway) -> None:
        most = _connections(gateway.settings.concurrency)
        super().__init__(
            uvicorn.Config(
                gateway,
                **SERVER_OPTIONS,
                http=limited(most),
                timeout_keep_alive=KEEPALIVE_S,
                timeout_graceful_shutdown=1,
            )
        )
        self.has_room = partial(has_room, self.server_state.connections, most)
        self._gateway = gateway
        self._loop: asyncio.AbstractEventLoop | None = None
        self._drain: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and listen to signals."""
        self._loop = asyncio.get_running_loop()
        self._gateway.on_broken = self.begin_drain
        if sockets:
            self._gateway.port = sockets[0].getsockname()[1]
        await super().startup(sockets)
        again = Order("asked by SIGHUP")
        self._loop.add_signal_handler(signal.SIGHUP, self._gateway.dispatcher.recycle, again)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take SIGTERM or SIGINT; uvicorn installs this as their handler."""
        logger.info("stopping signal=%s", signal.Signals(sig).name)
        if self._loop is not None:
            is_planned = sig != signal.SIGINT  # Ctrl-C: nobody is going to start us again
            self._loop.call_soon_threadsafe(partial(self.begin_drain, is_planned=is_planned))

    def begin_drain(self, *, is_planned: bool = True) -> None:
        """Let Immich keep its jobs, answer what is here, then end. A second call ends at once."""
        if self._drain is None:
            self._gateway.is_draining = True
            self._drain = asyncio.ensure_future(self._answer_the_rest(is_planned=is_planned))
        else:
            self.force_exit = self.should_exit = True

    async def _answer_the_rest(self, *, is_planned: bool) -> None:
        limit_s = self._gateway.settings.drain_limit_s
        try:
            is_paused = await self._gateway.companions.before_end(is_planned=is_planned)
            self._gateway.troubles.end()
            async with asyncio.timeout(max(limit_s - _END_RESERVE_S, limit_s / 2)):
                if is_paused:  # a job that Immich took just before still finds us
                    await self._quiet_at_immich()
                self._close_the_port()
                await self._quiet()
        except TimeoutError:
            left = self._gateway.open_requests
            logger.warning("drain limit reached limit_s=%.0f unanswered=%d", limit_s, left)
            self._gateway.dispatcher.refuse_all("the service is stopping")
            self._gateway.holding.end()
        finally:
            self._close_the_port()
            self.should_exit = True

    def _close_the_port(self) -> None:
        for listener in self.servers:
            listener.close()

    async def _quiet_at_immich(self) -> None:
        """Return once Immich is in the middle of no job; it may not know for sure."""
        for _ in range(_LOOKS):
            await self._quiet()
            if not await self._gateway.companions.active_jobs():
                return

    async def _quiet(self) -> None:
        """Return once no request has been open for `_QUIET_S`."""
        quiet_s = 0.0
        while quiet_s < _QUIET_S:
            await asyncio.sleep(_POLL_S)
            quiet_s = 0.0 if self._gateway.open_requests else quiet_s + _POLL_S


def run(
    settings: Settings,
    *,
    command: Sequence[str] = WORKER_COMMAND,
    check_command: Sequence[str] = CHECK_COMMAND,
) -> None:
    """Serve until a signal ends it.

    Raises:
        ConfigError: the address cannot be listened on, or two settings contradict each other.
    """
    _allow_many_files()
    gateway = Gateway(settings, command=command, check_command=check_command)
    sockets = listen(settings.host, settings.port)
    for listener in sockets:
        host, port = listener.getsockname()[:2]
        logger.info("listening host=%s port=%d", host, port)
    GatewayServer(gateway).run(sockets=sockets)
    if gateway.broken is not None:  # a service manager starts us again only after a failure
        raise gateway.broken


def _allow_many_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(_OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _connections(with_worker: int) -> int:
    """How many clients fit: each may need a file for its upload, some one to the worker."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = _OPEN_FILES if soft == resource.RLIM_INFINITY else soft
    return max(8, (files - _OWN_FILES - with_worker) // 2)
