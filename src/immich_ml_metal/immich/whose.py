"""Whether an Immich server depends on us alone: only then may its queues be paused."""

import socket
from collections.abc import Callable, Collection, Mapping
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
    urls: tuple[str, ...] = ()  # of Immich's settings, as they were when it depended on us alone


Lookup = Callable[[str], set[str]]


def look_up(host: str) -> set[str]:
    """The addresses that a name stands for.

    Raises:
        OSError, UnicodeError: the name server does not know it, or cannot be asked.
    """
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return {str(address[0]).partition("%")[0] for *_, address in found}


def no_lookup(host: str) -> set[str]:
    """In place of `look_up` where names cannot be looked up."""
    raise OSError(f"{host} is not looked up")


def find_dependence(
    server: ServerSettings,
    immich_url: str,
    port: int,
    hosts: Collection[str],
    *,
    last: Dependence | None = None,
    lookup: Lookup = look_up,
) -> Dependence:
    """Read it out of the server's settings.

    Args:
        server: its settings.
        immich_url: where it is reached, which tells whether it runs on this machine.
        port: ours.
        hosts: names and addresses of this machine.
        last: what was found before. It stays true of the same URLs while a name of theirs cannot
            be looked up: jobs must not be lost to a name server.
        lookup: finds the addresses of a name.
    """
    if not server.is_enabled:
        return Dependence(why_not_alone="machine learning is switched off in Immich's settings")
    ours = {url: _leads_here(url, immich_url, port, hosts, lookup) for url in server.urls}
    if None in ours.values() and last is not None and last.urls == tuple(ours):
        return last
    return _judge(ours, port)


def _judge(ours: Mapping[str, bool | None], port: int) -> Dependence:
    """By the URLs of Immich's settings and whether each leads here."""
    others = [url for url, is_here in ours.items() if not is_here]
    if len(others) == len(ours):
        urls = ", ".join(ours) or "none"
        return Dependence(False, f"Immich's URLs ({urls}) do not name this machine on port {port}")
    if others:
        also = ", ".join(others)
        return Dependence(True, f"Immich has another URL beside ours ({also})")
    return Dependence(True, "", tuple(ours))


def is_ours(url: str, immich_url: str, port: int, hosts: Collection[str]) -> bool:
    """Whether a URL in Immich's settings leads to this service."""
    return bool(_leads_here(url, immich_url, port, hosts, look_up))


def _leads_here(
    url: str, immich_url: str, port: int, hosts: Collection[str], lookup: Lookup
) -> bool | None:
    """Whether a URL leads to this service; None where its name cannot be looked up."""
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
        host = urlsplit(immich_url).hostname or ""
    if host in known:
        return True
    try:
        return bool(lookup(host) & known)
    except (OSError, UnicodeError):
        return None
