"""Taking the body of `/predict` apart."""

from typing import Any

import pytest
from doubles.timing import work_of_at_most
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import ClientDisconnect, Request

from immich_ml_metal.errors import ImageTooLarge, InvalidEntries
from immich_ml_metal.threads import CpuThreads
from immich_ml_metal.worker.form import (
    MAX_PART_HEAD_BYTES,
    MAX_PARTS,
    MAX_TEXT_BYTES,
    Form,
    read_form,
    split_form,
)

KIND = "multipart/form-data; boundary=B"


def part(name: str, value: bytes, more: str = "") -> bytes:
    head = f'Content-Disposition: form-data; name="{name}"{more}\r\n\r\n'
    return b"--B\r\n" + head.encode() + value + b"\r\n"


def split(*parts: bytes, kind: str = KIND, limit_bytes: int = 1000) -> Form:
    return split_form(b"".join([*parts, b"--B--\r\n"]), kind, limit_bytes=limit_bytes)


ENTRIES = part("entries", b"{}")


async def test_a_caller_that_hangs_up_in_mid_upload_leaves_no_form() -> None:
    messages = iter(
        [{"type": "http.request", "body": ENTRIES, "more_body": True}, {"type": "http.disconnect"}]
    )

    async def receive() -> Any:
        return next(messages)

    scope = {"type": "http", "method": "POST", "path": "/predict", "headers": []}
    threads = CpuThreads(1)
    with pytest.raises(ClientDisconnect):
        await read_form(Request(scope, receive), threads, limit_bytes=1000)
    threads.close()


def test_a_form_as_immich_sends_it() -> None:
    picture = bytes(range(256)) + b"\r\n--A\r\n--"
    blob = '; filename="blob"\r\nContent-Type: application/octet-stream'
    assert split(ENTRIES, part("image", picture, blob)) == Form("{}", picture, None)
    assert split(ENTRIES, part("text", "Schöner Hund".encode())) == Form("{}", None, "Schöner Hund")


@given(st.binary(max_size=300), st.text(st.characters(codec="utf-8"), max_size=50))
def test_what_is_put_in_comes_out(picture: bytes, text: str) -> None:
    if b"\r\n--B" in b"\r\n" + picture or "\r\n--B" in "\r\n" + text:
        return
    form = split(part("text", text.encode()), ENTRIES, part("image", picture))
    assert form == Form("{}", picture, text or None)


@pytest.mark.parametrize("charset", ["punycode", "latin-1", "utf-16", "idna", "undefined", "zip"])
def test_text_is_utf_8_whatever_the_sender_says(charset: str) -> None:
    kind = f"{KIND}; charset={charset}"
    assert split(ENTRIES, part("text", "Hündin".encode()), kind=kind).text == "Hündin"
    with pytest.raises(InvalidEntries, match="'text' is not UTF-8"):
        split(ENTRIES, part("text", "Hündin".encode("latin-1")), kind=kind)


@pytest.mark.parametrize(
    ("body", "kind", "reason"),
    [
        (ENTRIES, KIND, "cut off"),
        (b"--B\r\nno header", KIND, "cut off"),
        (b"--B\r\n\r\n--B--", KIND, "no header"),
        (b"--B\r\nContent-Type: a\r\n\r\nx\r\n--B--", KIND, "no name"),
        (b"--B\r\n\r\n" + ENTRIES[5:] + b"--B--", KIND, "no name"),  # all of it the value
        (b"--B garbage\r\n", KIND, "text stands behind a boundary"),
        (b"no boundary", KIND, "boundary is not in it"),
        (ENTRIES, "multipart/form-data", "boundary is not named"),
        (ENTRIES, 'multipart/form-data; boundary=""', "boundary has 0 bytes"),
        (ENTRIES, "multipart/form-data; boundary=" + "B" * 71, "boundary has 71 bytes"),
        (b'{"entries": "{}"}', "application/json", "'entries' is missing"),
        (b"", KIND, "boundary is not in it"),
        (b"entries=%ff", "application/x-www-form-urlencoded", "not a form"),
        (b"entries=\xff", "application/x-www-form-urlencoded", "not a form"),
        (b"a=1&" * 65, "application/x-www-form-urlencoded", "not a form"),
    ],
)
def test_what_is_no_form_is_told_why(body: bytes, kind: str, reason: str) -> None:
    with pytest.raises(InvalidEntries, match=reason):
        split_form(body, kind, limit_bytes=1000)


def test_a_form_without_any_file_may_be_url_encoded() -> None:
    kind = "application/x-www-form-urlencoded"
    form = split_form(b"entries=%7B%7D&text=sch%C3%B6n+hier", kind, limit_bytes=1)
    assert form == Form("{}", None, "schön hier")


def test_of_two_fields_with_one_name_the_last_counts() -> None:
    assert split(ENTRIES, part("entries", b"[]"), part("text", b"")).entries == "[]"


def test_a_preamble_blanks_behind_boundaries_and_an_epilogue_are_passed_over() -> None:
    body = b"Hello\r\n--B \t\r\n" + ENTRIES[5:] + b"--B--\r\nBye\r\n--B"
    assert split_form(body, KIND, limit_bytes=1).entries == "{}"
    quoted = 'multipart/form-data; boundary="B B"'
    assert split_form(body.replace(b"--B", b"--B B"), quoted, limit_bytes=1).entries == "{}"


def test_a_preamble_may_be_empty() -> None:
    assert split_form(b"\r\n" + ENTRIES + b"--B--", KIND, limit_bytes=1).entries == "{}"


def test_nothing_but_blanks_may_stand_behind_a_boundary() -> None:
    passed = []
    for value in range(256):
        try:
            split(b"--B" + bytes([value]) + ENTRIES[3:])
            passed.append(value)
        except InvalidEntries:
            continue
    assert bytes(passed) == b"\t "


def test_limits_are_inclusive() -> None:
    assert split(ENTRIES, part("image", bytes(1000))).image == bytes(1000)
    with pytest.raises(ImageTooLarge, match="1001 bytes, limit 1000"):
        split(ENTRIES, part("image", bytes(1001)))
    longest = b"x" * MAX_TEXT_BYTES
    assert split(part("entries", longest), part("text", longest)).text == longest.decode()
    for name in ("entries", "text"):
        with pytest.raises(InvalidEntries, match=f"'{name}' has 65537 bytes, limit 65536"):
            split(ENTRIES, part(name, longest + b"x"))
    assert split(*[ENTRIES] * MAX_PARTS).entries == "{}"
    with pytest.raises(InvalidEntries, match="over 64 fields"):
        split(*[ENTRIES] * (MAX_PARTS + 1))
    spare = MAX_PART_HEAD_BYTES - len(part("entries", b"")) + len(b"--B\r\n" + b"\r\n")
    assert split(part("entries", b"{}", "x" * spare)).entries == "{}"
    with pytest.raises(InvalidEntries, match="over 4096 bytes"):
        split(part("entries", b"{}", "x" * (spare + 1)))


def test_the_longest_boundary_has_seventy_bytes() -> None:
    body = b"--" + b"B" * 70 + ENTRIES[3:] + b"--" + b"B" * 70 + b"--"
    kind = "multipart/form-data; boundary=" + "B" * 70
    assert split_form(body, kind, limit_bytes=1).entries == "{}"


def test_limits_of_a_url_encoded_form_are_inclusive() -> None:
    kind = "application/x-www-form-urlencoded"
    more = b"&a=1" * (MAX_PARTS - 2)
    longest = b"entries=%7B%7D" + more + b"&b="
    longest += b"x" * (8 * MAX_TEXT_BYTES - len(longest))
    assert split_form(longest, kind, limit_bytes=1).entries == "{}"
    with pytest.raises(InvalidEntries, match=f"it has {8 * MAX_TEXT_BYTES + 1} bytes"):
        split_form(longest + b"x", kind, limit_bytes=1)


@pytest.mark.parametrize(
    "filling",
    [
        b"\r\n--",
        b"\r",
        b"\r\n-",
        b"--B",
        b"\r\n--" + b"B" * 69 + b"A",
        b'Content-Disposition: form-data; name="',
        b"\r\n\r\n",
    ],
)
def test_no_filling_takes_long(filling: bytes) -> None:
    megabytes = filling * (20_000_000 // len(filling))
    kind = "multipart/form-data; boundary=" + "B" * 70
    body = ENTRIES.replace(b"--B", b"--" + b"B" * 70) + b"--" + b"B" * 70 + b"\r\n" + megabytes
    with work_of_at_most(1), pytest.raises(InvalidEntries):
        split_form(body, kind, limit_bytes=10**8)
