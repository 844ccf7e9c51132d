"""Mutated requests, the same for the same seed, and what a running service makes of them.

`python tests/fuzz/storm.py PORT forms 100000` asks a service that is running already.
"""

import http.client
import io
import itertools
import json
import random
import re
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from doubles.live import ALL, TEXTUAL, VISUAL, face_entries
from doubles.tiny_models import draw_faces
from PIL import Image

from immich_ml_metal.tasks.images import count_pixels
from immich_ml_metal.worker.pipeline import GIANT_PIXELS

BOUNDARY = b"----formdata-undici-042"
CONTENT_TYPE = b"multipart/form-data; boundary=" + BOUNDARY
_MODEL = re.compile(rb'"modelName": "([^"]*)"')
TIMEOUT_S = 60.0
SLOWEST_S = 2.0
CLIENTS = 4
TURNS_S = 5.0  # of those that announce more pixels than are worked on side by side

# What parsers trip over, put anywhere.
FORM_WORDS = (
    *(
        b"\r\n--" + BOUNDARY,
        b"--" + BOUNDARY + b"--",
        b"\r\n\r\n",
        b"\r\n",
        b"--",
        b'"',
        b";",
        b"\0",
    ),
    *(b"; charset=punycode", b"filename=", b"name=", b'name="entries"', b"\xff\xfe", b"%00", b"="),
    *(
        b"{",
        b"[" * 2000,
        b'{"clip":' * 300,
        b"1e999",
        b"-0",
        b"null",
        b"NaN",
        b'"\\ud800"',
        b"9" * 400,
    ),
    *(b"minScore", b'"options":{"minScore":0}', b'"maxResolution":1', b"../../../etc", b"a" * 5000),
)
PICTURE_WORDS = (
    *(
        b"\xff\xd8",
        b"\xff\xda",
        b"\xff\xd9",
        b"\xff\xc0",
        b"\xff\xc2",
        b"\xff\xff",
        b"\xff\xe1\xff\xff",
    ),
    *(
        b"IDAT",
        b"IEND",
        b"iCCP",
        b"acTL",
        b"\0\0\0\0",
        b"\x7f\xff\xff\xff",
        b"\xff\xff\xff\xff",
        b"!\xfe",
    ),
    *(b"VP8X", b"VP8L", b"VP8 ", b"ANMF", b"II*\0", b"\0\0\1\0", b"ftypheic", b"%!PS-Adobe", b"BM"),
)
HEAD_WORDS = (
    *(b"\r\n", b"\n", b"\r", b":", b" ", b"\0", b"\t", b"\xff", b"Transfer-Encoding: chunked\r\n"),
    *(
        b"Content-Length: 5\r\n",
        b"Content-Length: 99999999999999999999\r\n",
        b"Expect: 100-continue\r\n",
    ),
    *(
        b"Upgrade: h2c\r\nConnection: Upgrade\r\n",
        b"X: " + b"a" * 9000 + b"\r\n",
        b"HTTP/2.0",
        b"%ff",
    ),
    *(b"Host: x\r\n", b"OPTIONS ", b"PRI * HTTP/2.0\r\n\r\n", b"0\r\n\r\n", b"fffffffff\r\n"),
)


def mutate(rng: random.Random, seed: bytes, words: tuple[bytes, ...]) -> bytes:
    """Change some places of `seed`."""
    data = bytearray(seed)
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        at, length = rng.randrange(len(data) + 1), rng.choice((1, 1, 2, 4, 16, 200))
        kind = rng.randrange(6)
        if kind == 0:
            data[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            data[at:at] = rng.choice(words)
        elif kind == 2:
            data[at : at + length] = b""
        elif kind == 3:
            data[at:at] = data[at : at + length] * rng.choice((1, 3, 50))
        elif kind == 4:
            data[at : at + length] = rng.randbytes(length)
        elif rng.random() < 0.3:
            del data[at:]
    return bytes(data)


def form(entries: object, **fields: bytes) -> bytes:
    """A form as Immich sends it."""
    parts = [(b"entries", b"", json.dumps(entries).encode())]
    for name, value in fields.items():
        more = b'; filename="blob"\r\nContent-Type: application/octet-stream'
        parts.append((name.encode(), more if name == "image" else b"", value))
    body = b"".join(
        b'--%s\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n'
        % (BOUNDARY, name, more, value)
        for name, more, value in parts
    )
    return body + b"--" + BOUNDARY + b"--\r\n"


def pictures() -> list[bytes]:
    """Small pictures in the formats that are decoded, and one that is not."""
    image = Image.open(io.BytesIO(draw_faces((60, 60), size=(160, 120)))).convert("RGB")
    kinds: list[tuple[str, dict[str, object]]] = [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("PNG", {}),
        ("GIF", {}),
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
        ("TIFF", {}),
    ]
    made = []
    for name, options in kinds:
        buffer = io.BytesIO()
        image.save(buffer, name, **options)
        made.append(buffer.getvalue())
    return made


def as_request(body: bytes, content_type: bytes = CONTENT_TYPE) -> bytes:
    """One HTTP request with `body`."""
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n"
    return head % (content_type, len(body)) + body


def mutated_forms(seed: int) -> Iterator[bytes]:
    """Requests whose form or content type is broken."""
    rng = random.Random(seed)
    small = pictures()[0]
    seen: Counter[bytes] = Counter()
    seeds = [
        form(TEXTUAL, text=b"a dog"),
        form(VISUAL, image=small),
        form(face_entries(0.7), image=small),
    ]
    while True:
        body, kind = rng.choice(seeds), CONTENT_TYPE
        if rng.random() < 0.1:
            kind = mutate(rng, kind, FORM_WORDS).translate(None, b"\r\n\0")
        else:
            body = mutate(rng, body, FORM_WORDS)
        name = b"|".join(_MODEL.findall(body))
        seen[name] += 1
        # A name that stays unknown is held from its third request on, to spare Immich's queue.
        if seen[name] <= 2 or name in {b"|".join(_MODEL.findall(one)) for one in seeds}:
            yield as_request(body, kind)


def mutated_pictures(seed: int) -> Iterator[bytes]:
    """Whole forms with a broken picture, for every task."""
    rng = random.Random(seed)
    seeds = pictures()
    while True:
        yield as_request(form(ALL, image=mutate(rng, rng.choice(seeds), PICTURE_WORDS)))


def mutated_heads(seed: int) -> Iterator[bytes]:
    """Requests whose line or headers are broken; the body is whole."""
    rng = random.Random(seed)
    head, _, body = as_request(form(TEXTUAL, text=b"a dog")).partition(b"\r\n\r\n")
    while True:
        yield mutate(rng, head, HEAD_WORDS) + b"\r\n\r\n" + body


KINDS: dict[str, Callable[[int], Iterator[bytes]]] = {
    "forms": mutated_forms,
    "pictures": mutated_pictures,
    "heads": mutated_heads,
}


@dataclass
class Report:
    """What came back. `bad` holds requests that were answered wrongly or late.

    `slack` multiplies what is late: a machine may have other work.
    """

    slack: float = 1.0
    statuses: Counter[int] = field(default_factory=Counter)
    slowest_s: float = 0.0
    bad: list[tuple[str, bytes]] = field(default_factory=list)

    def note(self, request: bytes, status: int, took_s: float, body: bytes) -> None:
        self.statuses[status] += 1
        self.slowest_s = max(self.slowest_s, took_s)
        late_s = self.slack * (TURNS_S if _is_giant(request) else SLOWEST_S)
        if status >= 500 or took_s > late_s:
            self.bad.append((f"{status} {body[:200]!r}", request))


def _is_giant(request: bytes) -> bool:
    _, _, image = request.partition(b"octet-stream\r\n\r\n")
    return (count_pixels(image) or 0) > GIANT_PIXELS


def ask(port: int, request: bytes, patience_s: float = TIMEOUT_S) -> tuple[int, bytes, float]:
    """Send bytes on a connection of their own.

    The status is 0 where the service only closed it, 1 where it did not answer in time.
    """
    started_s = time.monotonic()
    with socket.create_connection(("127.0.0.1", port), patience_s) as connection:
        try:
            connection.sendall(request)
            answer = http.client.HTTPResponse(connection)
            answer.begin()
            status, body = answer.status, answer.read()
        except TimeoutError:
            return 1, b"no answer", time.monotonic() - started_s
        except (OSError, http.client.HTTPException):
            status, body = 0, b""
    return status, body, time.monotonic() - started_s


def storm(port: int, kind: str, count: int, slack: float = 1.0) -> Report:
    """Ask with `count` mutated requests from several clients at once."""
    report, lock = Report(slack), threading.Lock()
    patience_s = 0.5 if kind == "heads" else TIMEOUT_S  # some of them announce a longer body
    requests = itertools.islice(KINDS[kind](0), count)

    def run() -> None:
        while True:
            with lock:
                request = next(requests, None)
            if request is None:
                return
            status, body, took_s = ask(port, request, patience_s)
            with lock:
                report.note(request, status, took_s, body)

    threads = [threading.Thread(target=run) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return report


if __name__ == "__main__":
    found = storm(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
    sys.stdout.write(f"{dict(found.statuses)} slowest {found.slowest_s:.2f} s\n")
    for why, bad_request in found.bad[:5]:
        sys.stdout.write(f"{why}\n{bad_request[:600]!r}\n")
