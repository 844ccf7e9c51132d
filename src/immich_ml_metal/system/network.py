"""How this machine is called on its network."""

import ipaddress
import socket
from collections.abc import Iterable

import psutil

# Names under which a container on this machine sees its host.
CONTAINER_HOSTS = ("host.docker.internal", "host.containers.internal", "host.lima.internal")


def lan_addresses() -> list[str]:
    """This machine's addresses that others can use, IPv4 first; no loopback, no link-local."""
    return usable(
        address.address.partition("%")[0]
        for interface in psutil.net_if_addrs().values()
        for address in interface
        if address.family in (socket.AF_INET, socket.AF_INET6)
    )


def usable(addresses: Iterable[str]) -> list[str]:
    """Those of `addresses` that another machine could connect to, IPv4 first."""
    parsed = {ipaddress.ip_address(address) for address in addresses}
    good = [a for a in parsed if not (a.is_loopback or a.is_link_local or a.is_unspecified)]
    return [str(a) for a in sorted(good, key=lambda a: (a.version, int(a)))]


def names_of_this_machine() -> frozenset[str]:
    """Every host part of a URL that may mean this machine."""
    name = socket.gethostname().lower()
    names = {name, name.partition(".")[0], f"{name.partition('.')[0]}.local", "localhost"}
    return frozenset({*names, *lan_addresses(), "127.0.0.1", "::1", *CONTAINER_HOSTS})


def url_host(address: str) -> str:
    """An address as it stands in a URL: IPv6 in brackets."""
    return f"[{address}]" if ":" in address else address


def urls_of(host: str, port: int) -> list[str]:
    """Addresses of a service that listens on `host`, as others type them, the best first."""
    everywhere = host in {"0.0.0.0", "::", ""}
    hosts = (lan_addresses()[:3] or ["127.0.0.1"]) if everywhere else [host]
    return [f"http://{url_host(one)}:{port}" for one in hosts]
