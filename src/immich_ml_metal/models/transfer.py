"""Bring one remote file to disk: resumed where it stopped, checked, renamed only when whole.

`huggingface_hub` 2.x throws a partial file away when its process ends, so the bytes are fetched
here; it supplies the addresses, the sizes, the digests and the credentials. Goes when it resumes.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import httpx2

from immich_ml_metal.errors import DownloadFailed, ModelUnavailable
from immich_ml_metal.models.progress import Tracker
from immich_ml_metal.models.remote import RemoteFile, Retry
from immich_ml_metal.system.disk import FULL, explain_write
from immich_ml_metal.system.network_settings import explain, proxy_for

PARTIAL = ".partial"
_RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})
_MAX_RETRY_AFTER_S = 120.0  # a server that asks for more is treated as asking for this


class Transient(Exception):
    """This try failed, another may succeed."""

    def __init__(self, reason: str, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


class Corrupt(Transient):
    """What arrived is not the file; start it again from nothing."""


class Transfer:
    """Fetches the files of one download through one HTTP client, until its tracker is stopped."""

    def __init__(self, client: httpx2.Client, retry: Retry, tracker: Tracker) -> None:
        self._client = client
        self._retry = retry
        self._tracker = tracker
        self.met_full_disk = False

    def fetch(self, file: RemoteFile, staged: Path) -> None:
        """Bring `file` to `staged`, going on from what an earlier try left beside it.

        Raises:
            ModelUnavailable: the source does not have it or does not let us have it.
            DownloadFailed: every try failed; what was received stays for the next time.
        """
        if staged.exists() and file.matches(staged):  # whole since an earlier try
            return
        partial = partial_path(file, staged)
        partial.parent.mkdir(parents=True, exist_ok=True)
        failures = 0
        while True:
            before = _size(partial)
            try:
                self._receive(file, partial)
                self._check(file, partial)
                partial.replace(staged)
            except Transient as exc:
                if isinstance(exc, Corrupt):
                    self._discard(partial)
                failures = 1 if _size(partial) > before else failures + 1
                if failures >= self._retry.attempts:
                    raise DownloadFailed(f"{file.path} from {file.url}: {exc}") from exc
                pause(exc, failures, self._retry, self._tracker)
            except OSError as exc:
                self.met_full_disk |= exc.errno in FULL
                raise DownloadFailed(explain_write(exc, staged, "ML_MODELS_DIR")) from exc
            else:
                return

    def _discard(self, partial: Path) -> None:
        self._tracker.advance(-_size(partial))
        partial.unlink(missing_ok=True)

    def _receive(self, file: RemoteFile, partial: Path) -> None:
        have = _size(partial)
        if file.size_bytes is not None and have == file.size_bytes:
            return  # an earlier try was ended between the last byte and the check
        headers = {"Accept-Encoding": "identity", **(file.headers or {})}
        if have:
            headers["Range"] = f"bytes={have}-"
        try:
            with self._client.stream("GET", file.url, headers=headers) as answer:
                have = self._accept(file, answer, partial, have)
                with partial.open("ab") as out:
                    self._copy(file, answer, out, have)
        except httpx2.RequestError as exc:
            raise Transient(describe_transport(exc)) from exc

    def _accept(self, file: RemoteFile, answer: httpx2.Response, partial: Path, have: int) -> int:
        """Judge the answer's head; returns the offset its body starts at."""
        raise_for_status(answer.status_code, answer.headers, file.url)
        if answer.headers.get("content-type", "").startswith("text/html"):
            raise Corrupt("the answer is a web page, not a file (a login page or a proxy?)")
        if have and answer.status_code != 206:  # the server does not resume
            self._discard(partial)
            have = 0
        if have and not answer.headers.get("content-range", "").startswith(f"bytes {have}-"):
            raise Corrupt("the server resumed at another place than asked")
        length = answer.headers.get("content-length")
        if answer.headers.get("content-encoding", "identity") != "identity":
            # A proxy that compresses although we asked it not to: its offsets and lengths are not
            # the file's, so only a whole answer is of use.
            if have:
                raise Corrupt("a proxy compresses what is resumed; starting again")
        elif length is not None and file.size_bytes not in (None, have + int(length)):
            raise Corrupt(f"wrong length: {have + int(length)} bytes, expected {file.size_bytes}")
        return have

    def _copy(self, file: RemoteFile, answer: httpx2.Response, out: BinaryIO, have: int) -> None:
        for chunk in answer.iter_bytes():  # as they arrive: none is lost in a buffer
            self._tracker.raise_if_stopped()
            have += len(chunk)
            if file.size_bytes is not None and have > file.size_bytes:
                raise Corrupt(f"wrong length: more than the expected {file.size_bytes} bytes")
            out.write(chunk)
            self._tracker.advance(len(chunk))
        out.flush()
        os.fsync(out.fileno())
        if file.size_bytes is not None and have < file.size_bytes:
            raise Transient(f"the line was cut at byte {have} of {file.size_bytes}")

    @staticmethod
    def _check(file: RemoteFile, partial: Path) -> None:
        if not file.matches(partial):
            raise Corrupt("wrong digest: the file was damaged on the way")


# What the HTTP and hub libraries raise over a variable, a certificate or an answer out of order.
_FOREIGN = (
    ImportError,
    OSError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    RuntimeError,
    httpx2.RequestError,
    httpx2.InvalidURL,
)


@contextmanager
def network(what: str) -> Iterator[None]:
    """Turn what libraries raise before or beside the network into a failed download.

    Raises:
        DownloadFailed: with the variable to blame, where one is.
    """
    try:
        yield
    except _FOREIGN as exc:
        raise DownloadFailed(f"{what}: {explain(exc)}") from exc


def pause(exc: Transient, failures: int, retry: Retry, tracker: Tracker) -> None:
    """Wait before the next try, and say so.

    Raises:
        DownloadFailed: the download was stopped meanwhile.
    """
    tracker.retry(str(exc), retry.wait_s(failures) if exc.wait_s is None else exc.wait_s)


def partial_path(file: RemoteFile, staged: Path) -> Path:
    """Where the bytes of an unfinished download lie; named by digest so that versions never mix."""
    return staged.with_name(f"{staged.name}.{file.digest[:16]}{PARTIAL}")


def raise_for_status(status: int, headers: Mapping[str, str], url: str) -> None:
    """Turn an HTTP status into the failure it means.

    Raises:
        Transient: worth another try; with the pause the server asked for.
        ModelUnavailable: it is not there, or not for us.
    """
    if status < 400:
        return
    if status in _RETRIED:
        raise Transient(f"the server answered {status}", _retry_after_s(headers))
    if status == 416:
        raise Corrupt("the server has fewer bytes than an earlier try received")
    if status == 407:
        raise Transient(
            "the proxy wants a user and a password (407): set HTTPS_PROXY or HTTP_PROXY to "
            "http://USER:PASSWORD@HOST:PORT"
        )
    if status in (401, 403):
        proxy = proxy_for(url)
        if status == 403 and proxy:
            raise Transient(f"{url} answered 403: the proxy of {proxy} or the hub denies it")
        raise ModelUnavailable(
            f"{url} answered {status}: access denied; set HF_TOKEN if it is private or gated"
        )
    raise ModelUnavailable(f"{url} answered {status}: no such file")


def describe_transport(exc: Exception) -> str:
    """A transport failure in plain words."""
    if isinstance(exc, httpx2.ConnectTimeout | httpx2.ConnectError):
        return f"cannot connect ({exc})" if str(exc) else "cannot connect"
    if isinstance(exc, httpx2.TimeoutException):
        return "no data for too long"
    if isinstance(exc, httpx2.ProxyError):
        return f"the proxy of HTTPS_PROXY, HTTP_PROXY or ALL_PROXY failed ({exc})"
    if isinstance(exc, httpx2.TooManyRedirects):
        return "the server redirects in a loop"
    if isinstance(exc, httpx2.DecodingError):
        return f"what arrives is not encoded as its Content-Encoding says ({exc})"
    return f"the line was cut ({exc})" if str(exc) else "the line was cut"


def _retry_after_s(headers: Mapping[str, str]) -> float | None:
    try:
        return min(max(0.0, float(headers.get("retry-after", ""))), _MAX_RETRY_AFTER_S)
    except ValueError:  # absent, or a date
        return None


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
