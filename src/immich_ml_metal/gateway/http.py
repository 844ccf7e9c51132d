"""Complete answers of the gateway itself, as ASGI messages."""

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from immich_ml_metal.gateway.client import Headers

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

# How long a refused client may go on sending before the connection is closed. Closed with bytes
# unread, TCP resets it, and the client may never see why it was refused.
_LINGER_S = 2.0


async def reply(send: Send, status: int, headers: Headers, body: bytes) -> None:
    """Send one answer."""
    await send(_start(status, headers, len(body)))
    await send({"type": "http.response.body", "body": body})


async def reply_json(
    send: Send, status: int, content: Any, *headers: tuple[bytes, bytes], indent: int | None = None
) -> None:
    """Send one JSON answer, indented for people. Any: whatever `json` takes."""
    separators = (",", ":") if indent is None else None
    body = json.dumps(content, separators=separators, indent=indent).encode()
    await reply(send, status, [(b"content-type", b"application/json"), *headers], body)


async def reply_unread(
    receive: Receive, send: Send, status: int, detail: str, *headers: tuple[bytes, bytes]
) -> None:
    """Refuse a request whose body was not read to its end, and close the connection."""
    body = json.dumps({"detail": detail}).encode()
    kind = (b"content-type", b"application/json")
    await send(_start(status, [kind, (b"connection", b"close"), *headers], len(body)))
    await send({"type": "http.response.body", "body": body, "more_body": True})
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_LINGER_S):
            await _discard(receive)
    await send({"type": "http.response.body", "body": b""})


async def _discard(receive: Receive) -> None:
    while (await receive()).get("more_body", False):
        pass


def _start(status: int, headers: Headers, size_bytes: int) -> Message:
    length = (b"content-length", b"%d" % size_bytes)
    return {"type": "http.response.start", "status": status, "headers": [*headers, length]}
