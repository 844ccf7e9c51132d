"""uvicorn's HTTP protocol, with a limit for clients that never finish their headers."""

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEADER_LIMIT_S = 30.0


class PatientProtocol(HttpToolsProtocol):
    """Closes a connection whose request line and headers are not complete in time.

    uvicorn itself waits for ever, from the connection on and after the first byte of each request.
    Goes when uvicorn has such a limit.
    """

    header_limit_s = HEADER_LIMIT_S
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first request."""
        super().connection_made(transport)
        self._begin_wait()

    def on_message_begin(self) -> None:
        """Begin to wait for the headers of a request whose first byte is here."""
        super().on_message_begin()
        self._begin_wait()

    def on_headers_complete(self) -> None:
        """The request is known; its body has its own time limit."""
        self._end_wait()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is waited for any more."""
        self._end_wait()
        super().connection_lost(exc)

    def _begin_wait(self) -> None:
        self._end_wait()
        self._deadline = self.loop.call_later(self.header_limit_s, self.transport.close)

    def _end_wait(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
