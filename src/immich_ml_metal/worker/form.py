"""The body of `/predict`: a form with `entries` and a picture or a text, read up to a limit.

Split here and not by a library: all of it is found by searching for bytes, so the time is linear
whatever was sent, and no sender chooses a codec.
"""

import re
from dataclasses import dataclass
from urllib.parse import parse_qsl

from starlette.requests import ClientDisconnect, Request

from immich_ml_metal import errors
from immich_ml_metal.threads import CpuThreads

MAX_TEXT_BYTES = 64 * 1024  # of `entries`, and of a text: search models read 77 or 64 tokens of it
MAX_PARTS = 64  # Immich sends two
MAX_PART_HEAD_BYTES = 4096
_FORM_OVERHEAD_BYTES = 2**20  # entries, text and boundaries around the largest picture
_INLINE_BYTES = 256 * 1024  # split in microseconds; more is split on a thread
_MAX_BOUNDARY_BYTES = 70  # RFC 2046 §5.1.1

_PARAMETER = r';\s*%s=(?:"((?:[^"\\]|\\.)*)"|([^\s;"]+))'
_BOUNDARY = re.compile(_PARAMETER % "boundary", re.IGNORECASE)
_NAME = re.compile(_PARAMETER % "name", re.IGNORECASE)
_FILENAME = re.compile(r";\s*filename\*?=", re.IGNORECASE)
_DISPOSITION = re.compile(rb"^content-disposition[ \t]*:([^\r\n]*)", re.IGNORECASE | re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Form:
    """What a caller sent; an empty text counts as none."""

    entries: str
    image: bytes | None
    text: str | None


@dataclass(frozen=True, slots=True)
class _Part:
    """One field; a file has a file name, which is not looked at."""

    value: bytes
    is_file: bool


async def read_form(request: Request, threads: CpuThreads, *, limit_bytes: int) -> Form:
    """Read the body, stop soon after the limit, and split it.

    Raises:
        ImageTooLarge: the picture has more than `limit_bytes`.
        InvalidEntries: the body is not a form, or has no `entries`.
        ClientDisconnect: the caller hung up.
    """
    body = await _read(request, limit_bytes)
    content_type = request.headers.get("content-type", "")
    if len(body) <= _INLINE_BYTES:
        return split_form(body, content_type, limit_bytes=limit_bytes)
    return await threads.run(lambda: split_form(body, content_type, limit_bytes=limit_bytes))


async def _read(request: Request, limit_bytes: int) -> bytearray:
    allowed = limit_bytes + _FORM_OVERHEAD_BYTES
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > allowed:
        raise errors.ImageTooLarge(f"the upload has {length} bytes, limit {limit_bytes}")
    body, more = bytearray(), True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        body += message.get("body", b"")
        if len(body) > allowed:
            raise errors.ImageTooLarge(
                f"the upload has over {len(body)} bytes, limit {limit_bytes}"
            )
        more = message.get("more_body", False)
    return body


def split_form(body: bytes | bytearray, content_type: str, *, limit_bytes: int) -> Form:
    """Take a form apart; of fields with one name the last counts.

    Raises:
        ImageTooLarge: the picture has more than `limit_bytes`.
        InvalidEntries: the body is not a form, a field is too long or not UTF-8, or `entries` is
            missing.
    """
    kind = content_type.partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        parts = _split_multipart(body, content_type)
    elif kind == "application/x-www-form-urlencoded":
        parts = _split_urlencoded(body)
    else:
        parts = {}
    entries = parts.get("entries")
    if entries is None:
        raise errors.InvalidEntries("the form field 'entries' is missing")
    if entries.is_file:
        raise errors.InvalidEntries("the form field 'entries' is a file, it must be a text")
    image, text = parts.get("image"), parts.get("text")
    if image is not None and len(image.value) > limit_bytes:
        size = len(image.value)
        raise errors.ImageTooLarge(f"the image has {size} bytes, limit {limit_bytes}")
    return Form(
        _text("entries", entries.value),
        None if image is None else image.value,
        None if text is None or text.is_file else _text("text", text.value) or None,
    )


def _text(name: str, value: bytes) -> str:
    """A field's text. Always UTF-8: a codec that a sender could choose may take minutes."""
    if len(value) > MAX_TEXT_BYTES:
        reason = f"has {len(value)} bytes, limit {MAX_TEXT_BYTES}"
        raise errors.InvalidEntries(f"the form field '{name}' {reason}")
    try:
        return value.decode()
    except UnicodeDecodeError as exc:
        raise errors.InvalidEntries(f"the form field '{name}' is not UTF-8: {exc.reason}") from exc


def _split_urlencoded(body: bytes | bytearray) -> dict[str, _Part]:
    if len(body) > 8 * MAX_TEXT_BYTES:  # three characters a byte at most, two fields
        raise _no_form(f"it has {len(body)} bytes and is no multipart form")
    try:
        fields = parse_qsl(
            body.decode("ascii"), keep_blank_values=True, max_num_fields=MAX_PARTS, errors="strict"
        )
        return {name: _Part(value.encode(), is_file=False) for name, value in fields}
    except ValueError as exc:
        raise _no_form(str(exc)) from exc


def _split_multipart(body: bytes | bytearray, content_type: str) -> dict[str, _Part]:
    delimiter = b"--" + _boundary(content_type)
    if not body.startswith(delimiter):  # a preamble is allowed, and never sent
        found = body.find(b"\r\n" + delimiter)
        if found < 0:
            raise _no_form("its boundary is not in it")
        at = found + 2
    else:
        at = 0
    parts: dict[str, _Part] = {}
    at += len(delimiter)
    for _ in range(MAX_PARTS + 1):
        if body.startswith(b"--", at):
            return parts
        start = _skip_line_end(body, at)
        end = body.find(b"\r\n" + delimiter, start - 2)
        if end < 0:
            raise _no_form("it is cut off")
        name, part = _read_part(body, start, end)
        parts[name] = part
        at = end + 2 + len(delimiter)
    raise _no_form(f"it has over {MAX_PARTS} fields")


def _boundary(content_type: str) -> bytes:
    found = _BOUNDARY.search(content_type[:MAX_PART_HEAD_BYTES])
    if found is None:
        raise _no_form("its boundary is not named")
    boundary = (found[1] or found[2] or "").encode("latin-1", errors="replace")
    if not 0 < len(boundary) <= _MAX_BOUNDARY_BYTES:
        raise _no_form(f"its boundary has {len(boundary)} bytes")
    return boundary


def _skip_line_end(body: bytes | bytearray, at: int) -> int:
    """Where the line behind a boundary ends; blanks may stand on it (RFC 2046)."""
    line = bytes(body[at : at + _MAX_BOUNDARY_BYTES])
    end = line.find(b"\r\n")
    if end < 0 or line[:end].strip(b" \t"):
        raise _no_form("text stands behind a boundary")
    return at + end + 2


def _read_part(body: bytes | bytearray, start: int, end: int) -> tuple[str, _Part]:
    head_end = body.find(b"\r\n\r\n", start - 2, min(end, start + MAX_PART_HEAD_BYTES))
    if head_end < 0:
        raise _no_form(f"a field has no header, or one over {MAX_PART_HEAD_BYTES} bytes")
    disposition = _DISPOSITION.search(bytes(body[start:head_end]))
    try:
        head = "" if disposition is None else disposition[1].decode()
    except UnicodeDecodeError as exc:
        raise _no_form("a field's header is not UTF-8") from exc
    named = _NAME.search(head)
    if named is None:
        raise _no_form("a field has no name")
    value = bytes(memoryview(body)[min(head_end + 4, end) : end])
    return named[1] if named[1] is not None else named[2], _Part(
        value, bool(_FILENAME.search(head))
    )


def _no_form(reason: str) -> errors.InvalidEntries:
    return errors.InvalidEntries(f"the body is not a form: {reason}")
