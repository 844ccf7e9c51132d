"""The addresses that are listened on."""

import socket

import pytest

from immich_ml_metal.errors import ConfigError
from immich_ml_metal.system.listen import listen

needs_ipv6 = pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 here")


def connect(address: str, port: int) -> None:
    socket.create_connection((address, port), timeout=10).close()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "[::]", ""])
@needs_ipv6
def test_any_address_means_both_families(host: str) -> None:
    [listener] = listen(host, 0)
    with listener:
        port = listener.getsockname()[1]
        connect("127.0.0.1", port)
        connect("::1", port)


def test_a_name_is_listened_on_at_each_of_its_addresses() -> None:
    listeners = listen("localhost", 0)
    for listener in listeners:
        connect(*listener.getsockname()[:2])
        listener.close()
    assert len({listener.family for listener in listeners}) == len(listeners)


def test_a_taken_port_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1 port {port}: another program"):
            listen("127.0.0.1", port)
