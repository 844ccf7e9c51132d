"""Whether an Immich depends on us alone."""

import socket

import pytest

from immich_ml_metal.immich.api import ServerSettings
from immich_ml_metal.immich.whose import Dependence, find_dependence, no_lookup

HOSTS = {
    *("mac.local", "mac", "192.168.1.5", "2001:db8::5"),
    *("localhost", "127.0.0.1", "::1", "host.docker.internal"),
}
ON_NAS, ON_THIS = "http://192.168.1.9:2283", "http://localhost:2283"


def why(*urls: str, immich: str = ON_NAS, enabled: bool = True) -> str:
    server = ServerSettings(enabled, urls, {}, {})
    return find_dependence(server, immich, 3003, HOSTS).why_not_alone


@pytest.mark.parametrize(
    "url",
    [
        "http://mac.local:3003",
        "http://192.168.1.5:3003/",
        "HTTP://MAC:3003",
        "http://mac.local.:3003",
        "http://[2001:DB8::5]:3003",
        "http://[2001:db8:0:0::5]:3003/",
    ],
)
def test_one_url_that_leads_here_is_ours(url: str) -> None:
    assert why(url) == ""


@pytest.mark.parametrize("url", ["http://localhost:3003", "http://host.docker.internal:3003"])
def test_names_that_mean_this_machine_only_here_count_only_where_immich_is_here(url: str) -> None:
    assert "do not name this machine" in why(url)
    assert why(url, immich=ON_THIS) == ""


@pytest.mark.parametrize(
    ("urls", "said"),
    [
        (("http://mac.local:3003", "http://192.168.1.7:3003"), "another URL beside ours"),
        (("http://mac.local:3004",), "do not name this machine on port 3003"),
        (("https://mac.local:3003",), "do not name this machine"),
        (("mac.local:3003",), "do not name this machine"),
        (("http://mac.local",), "do not name this machine"),
        (("http://mac.local:port",), "do not name this machine"),
        (("http://192.168.1.7:3003",), "do not name this machine"),
        ((), "do not name this machine"),
    ],
)
def test_everything_else_is_left_alone_and_said(urls: tuple[str, ...], said: str) -> None:
    assert said in why(*urls)


def test_machine_learning_that_is_switched_off_is_left_alone() -> None:
    assert "switched off" in why("http://mac.local:3003", enabled=False)


def test_a_url_without_a_port_means_port_80() -> None:
    server = ServerSettings(True, ("http://mac.local",), {}, {})
    assert find_dependence(server, ON_NAS, 80, HOSTS).why_not_alone == ""


def test_a_name_counts_by_the_address_it_stands_for() -> None:
    server = ServerSettings(True, (f"http://{socket.gethostname()}:3003",), {}, {})
    address = socket.gethostbyname(socket.gethostname())
    assert find_dependence(server, ON_NAS, 3003, {address}).why_not_alone == ""


def found_without_names(last: Dependence, *urls: str, enabled: bool = True) -> Dependence:
    server = ServerSettings(enabled, urls, {}, {})
    return find_dependence(server, ON_NAS, 3003, HOSTS, last=last, lookup=no_lookup)


def test_a_name_server_that_fails_does_not_unsay_what_was_found() -> None:
    url = "http://ml.example:3003"
    alone = Dependence(is_named=True, why_not_alone="", urls=(url,))
    assert found_without_names(alone, url) == alone
    assert "do not name this machine" in found_without_names(Dependence(), url).why_not_alone
    assert found_without_names(alone, "http://new.example:3003").why_not_alone
    assert "switched off" in found_without_names(alone, url, enabled=False).why_not_alone


def test_a_name_that_leads_elsewhere_now_is_not_ours_any_more() -> None:
    url = "http://ml.example:3003"
    server = ServerSettings(True, (url,), {}, {})
    addresses = {"192.168.1.5"}

    def find(last: Dependence) -> Dependence:
        return find_dependence(server, ON_NAS, 3003, HOSTS, last=last, lookup=lambda _: addresses)

    alone = find(Dependence())
    assert alone.why_not_alone == ""
    addresses = {"192.168.1.9"}
    assert "do not name this machine" in find(alone).why_not_alone
