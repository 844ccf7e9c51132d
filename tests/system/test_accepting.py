"""Connections that come while there is no room for them: they wait, and are taken in later."""

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from doubles.files import no_more_files
from doubles.timing import PATIENCE_S, until

from immich_ml_metal.system import accepting
from immich_ml_metal.system.accepting import Acceptor
from immich_ml_metal.system.listen import listen, listen_on_path


class Greeter(asyncio.Protocol):
    """Says that it is there."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        transport.write(b"here")
        transport.close()


def client(address: tuple[str, int] | str, family: int = socket.AF_INET) -> socket.socket:
    """Connected, or on its way."""
    one = socket.socket(family)
    one.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        one.connect(address)
    return one


async def greeting(one: socket.socket) -> bytes:
    loop = asyncio.get_running_loop()
    return await asyncio.wait_for(loop.sock_recv(one, 10), PATIENCE_S)


@contextlib.asynccontextmanager
async def accepting_on(
    listener: socket.socket, has_room: Callable[[int], bool] = lambda coming: True
) -> AsyncIterator[Acceptor]:
    acceptor = Acceptor(listener, Greeter, has_room)
    try:
        yield acceptor
    finally:
        acceptor.close()


async def test_clients_wait_while_no_descriptor_is_left_and_one_line_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    (listener,) = listen("127.0.0.1", 0)
    clients = [client(listener.getsockname()) for _ in range(20)]
    with caplog.at_level(logging.WARNING, accepting.__name__):
        acceptor = Acceptor(listener, Greeter)
        with no_more_files():
            await asyncio.sleep(6 * accepting._AGAIN_S)
        assert await asyncio.gather(*map(greeting, clients)) == [b"here"] * 20
    (line,) = caplog.messages
    assert line == "new connections wait: Too many open files; allow more files with ulimit -n"
    acceptor.close()
    for one in clients:
        one.close()


async def test_clients_wait_while_there_is_no_room_and_those_on_their_way_are_counted() -> None:
    (listener,) = listen("127.0.0.1", 0)
    counted: list[int] = []
    is_full = True

    def has_room(coming: int) -> bool:
        counted.append(coming)
        return not is_full and coming < 3

    async with accepting_on(listener, has_room):
        clients = [client(listener.getsockname()) for _ in range(10)]
        await until(lambda: len(counted) > 3)
        assert set(counted) == {0}
        is_full = False
        assert await asyncio.gather(*map(greeting, clients)) == [b"here"] * 10
    assert max(counted) == 3
    for one in clients:
        one.close()


async def test_a_closed_acceptor_refuses_also_while_it_pauses() -> None:
    (listener,) = listen("127.0.0.1", 0)
    address = listener.getsockname()
    acceptor = Acceptor(listener, Greeter, lambda coming: False)
    waiting = client(address)
    await asyncio.sleep(accepting._AGAIN_S)
    for _ in range(2):
        acceptor.close()
    await acceptor.wait_closed()
    await asyncio.sleep(2 * accepting._AGAIN_S)  # it does not go on by itself
    with pytest.raises(ConnectionError):
        await greeting(waiting)
    with pytest.raises(ConnectionError), socket.socket() as late:
        late.connect(address)
    waiting.close()


async def test_a_unix_socket_is_served_too(tmp_path: Path) -> None:
    path = tmp_path / "s"
    async with accepting_on(listen_on_path(path)):
        one = client(str(path), socket.AF_UNIX)
        assert await greeting(one) == b"here"
        one.close()


def test_a_socket_that_cannot_be_bound_leaves_nothing_open(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        listen_on_path(tmp_path / "none" / "s")
