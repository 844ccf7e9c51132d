"""A service of our own for the length of a command: started on a free port, stopped at the end."""

import contextlib
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import httpx
import psutil

from immich_ml_metal.errors import ServiceError


class ServiceDidNotStart(ServiceError):
    """The service ended or stayed silent; the message carries its last words."""


@dataclass(frozen=True, slots=True)
class Child:
    """A running service: its address and its process."""

    url: str
    pid: int

    def resident_bytes(self) -> int:
        """Resident memory of the service's processes."""
        process = psutil.Process(self.pid)
        total = 0
        for member in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                total += member.memory_info().rss
        return total


@contextlib.contextmanager
def running_service(
    options: Mapping[str, str], *, start_timeout_s: float = 60.0
) -> Iterator[Child]:
    """Run `immich-ml-metal serve` with `options` (`{"--models-dir": ...}`) on loopback.

    Raises:
        ServiceDidNotStart: it did not answer `/ping` in time.
    """
    port = _free_port()
    arguments = [part for pair in options.items() for part in pair if part]
    command = [sys.executable, "-m", "immich_ml_metal", "serve", "--host", "127.0.0.1"]
    with tempfile.TemporaryFile("w+") as words:
        process = subprocess.Popen(
            [*command, "--port", str(port), *arguments], stdout=words, stderr=subprocess.STDOUT
        )
        try:
            _wait_until_up(process, port, start_timeout_s, words)
            yield Child(f"http://127.0.0.1:{port}", process.pid)
        finally:
            process.terminate()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_until_up(
    process: "subprocess.Popen[bytes]", port: int, timeout_s: float, words: object
) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"http://127.0.0.1:{port}/ping", timeout=2).is_success:
                return
        time.sleep(0.05)
    words.seek(0)  # type: ignore[attr-defined]  # a temporary file
    raise ServiceDidNotStart(f"the service did not start: {words.read()[-2000:]}")  # type: ignore[attr-defined]
