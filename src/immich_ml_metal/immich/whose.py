"""Whether an Immich server depends on us alone: only then may its queues be paused."""

import contextlib
import socket
from collections.abc import Collection
from dataclasses import dataclass
from urllib.parse import urlsplit

from immich_ml_metal.immich.api import ServerSettings
from immich_ml_metal.system.network import CONTAINER_HOSTS

# Names that mean this machine only for who is on it.
_HERE_ONLY = frozenset({"localhost", "127.0.0.1", "::1", *CONTAINER_HOSTS})


@dataclass(frozen=True, slots=True)
class Dependence:
    """How an Immich server depends on us: whether it names us, and why not us alone."""

    is_named: bool = False
    why_not_alone: str = "Immich has not been asked yet"


def find_dependence(
    server: ServerSettings, immich_url: str, port: int, hosts: Collection[str]
) -> Dependence:
    """Read it out of the server's settings.

    Args:
        server: its settings.
        immich_url: where it is reached, which tells whether it runs on this machine.
        port: ours.
        hosts: names and addresses of this machine.
    """
    if not server.is_enabled:
        return Dependence(why_not_alone="machine learning is switched off in Immich's settings")
    others = [url for url in server.urls if not is_ours(url, immich_url, port, hosts)]
    if not server.urls or len(others) == len(server.urls):
        urls = ", ".join(server.urls) or "none"
        return Dependence(
            why_not_alone=f"Immich's URLs ({urls}) do not name this machine on port {port}"
        )
    if others:
        also = ", ".join(others)
        return Dependence(True, f"Immich has another URL beside ours ({also})")
    return Dependence(is_named=True, why_not_alone="")


def is_ours(url: str, immich_url: str, port: int, hosts: Collection[str]) -> bool:
    """Whether a URL in Immich's settings leads to this service."""
    try:
        parts = urlsplit(url)
        asked = parts.port or 80
    except ValueError:
        return False
    host = (parts.hostname or "").removesuffix(".")
    if asked != port or parts.scheme != "http":  # with https something else answers there
        return False
    known = {name.lower() for name in hosts}
    if host in _HERE_ONLY:
        return _is_here(urlsplit(immich_url).hostname or "", known)
    return _is_here(host, known)


def _is_here(host: str, known: Collection[str]) -> bool:
    """Whether a host is this machine, by its name or by an address that its name stands for."""
    return host in known or bool(_addresses(host) & set(known))


def _addresses(host: str) -> set[str]:
    with contextlib.suppress(OSError, UnicodeError):
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        return {str(address[0]).partition("%")[0] for *_, address in found}
    return set()
