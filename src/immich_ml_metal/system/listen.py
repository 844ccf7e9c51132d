"""The listening sockets: both families of addresses where the machine has both."""

import contextlib
import errno
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from immich_ml_metal.errors import ConfigError

ANY_HOSTS = {"", "*", "0.0.0.0", "::", "[::]"}  # what users write for "every address"
_BACKLOG = 1024
# How long an idle connection stays open: longer than the pool of Immich's Node keeps one, so that
# it never sends on a connection that is being closed.
KEEPALIVE_S = 75
# How uvicorn serves each of our apps. Any: keyword arguments of its `Config`.
SERVER_OPTIONS: Mapping[str, Any] = MappingProxyType(
    {
        "log_config": None,
        "log_level": "warning",  # its start and stop lines repeat ours
        "access_log": False,
        "ws": "none",
        "server_header": False,
    }
)


class CannotListen(ConfigError):
    """The address is taken, or not there yet: it may pass, so a service is started again."""


def listen(host: str, port: int) -> list[socket.socket]:
    """Bind `host`, and listen; 0 as `port` picks a free one, the same for every address.

    Every spelling of "any address" listens on IPv4 and IPv6 together, or on IPv4 alone where the
    machine has no IPv6: `localhost` may resolve to either.

    Raises:
        CannotListen: the address is not ours or the port is taken.
        ConfigError: no machine can have such a name.
    """
    try:
        if host in ANY_HOSTS:
            return [_listen_anywhere(port)]
        return _listen_on_all(host.strip("[]"), port)
    except UnicodeError as exc:
        raise ConfigError(f"cannot listen on {host} port {port}: not a name of a machine") from exc
    except OSError as exc:
        raise CannotListen(f"cannot listen on {host} port {port}: {_reason(exc)}") from exc


def listen_on_path(path: Path) -> socket.socket:
    """Listen on a unix socket.

    Raises:
        OSError: the folder cannot be written, or something lies at `path`.
    """
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(str(path))
        listener.listen(_BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


def check_address(host: str, port: int) -> None:
    """Try whether `listen` would succeed.

    Raises:
        ConfigError: as `listen`.
    """
    for one in listen(host, port):
        one.close()


def _reason(exc: OSError) -> str:
    if exc.errno == errno.EADDRINUSE:
        return "another program listens there; ML_PORT chooses another port"
    if isinstance(exc, socket.gaierror) or exc.errno is None:
        return str(exc.strerror or exc)
    return os.strerror(exc.errno)  # Python's own words name the address a second time


def _listen_anywhere(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(
                ("::", port), family=socket.AF_INET6, backlog=_BACKLOG, dualstack_ipv6=True
            )
        except OSError as exc:
            if exc.errno == errno.EADDRINUSE:
                raise
    return socket.create_server(("0.0.0.0", port), backlog=_BACKLOG)


def _listen_on_all(host: str, port: int) -> list[socket.socket]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    addresses = dict.fromkeys((family, str(address[0])) for family, _, _, _, address in found)
    sockets: list[socket.socket] = []
    with contextlib.ExitStack() as undo:
        for family, address in addresses:
            bound = socket.create_server((address, port), family=family, backlog=_BACKLOG)
            undo.callback(bound.close)
            sockets.append(bound)
            port = bound.getsockname()[1]
        undo.pop_all()
    return sockets
