"""A test double of the worker: a real process on a real unix socket, without any model.

It answers a `/predict` with the SHA-256 of the body it got. Words in the body make it misbehave:
`[abort]`, `[bye]`, `[hang]`, `[block 2]`, `[burn 2]`, `[sleep 0.5]`, `[leak 50]`, `[status 500]`;
`[busy]` is worked on for as long as there is a file `busy` in the folder;
`[later]` is put off (503 with Retry-After) for as long as there is a file `offline` in the folder.
`[starve]` is told to get no memory for as long as there is a file `full` in the folder.
Files in the folder that is its first argument make it misbehave at start: `refuse`, `bad-settings`,
`held` (until it is gone), `stubborn`; what `health.json` holds is told on `/health`; `broken-clip`
(or another task) holds the name of the failure that every request of that task gets. It writes what
it does into `journal` there.
Run as `python worker.py FOLDER SOCKET`.
"""

import asyncio
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from immich_ml_metal.worker.process import EXIT_BAD_SETTINGS, read_settings, serve

_WORD = re.compile(
    rb"\[(abort|hang|busy|block|burn|sleep|leak|status|bye|later|starve) ?([\d.]*)\]"
)

PASSING = {b"later": "offline", b"starve": "full"}
_AGAIN = (b"retry-after", b"0")
BROKEN: dict[str, tuple[int, list[tuple[bytes, bytes]]]] = {
    "ModelUnavailable": (503, []),
    "UnknownModel": (422, []),
    "LoadFailed": (500, []),
    "InferenceError": (500, []),
    "InvalidImage": (400, []),
    "DownloadFailed": (503, [_AGAIN]),
}


class FakeWorker:
    def __init__(self, folder: Path, preloaded: list[str]) -> None:
        self.folder = folder
        self.preloaded = preloaded
        self.progress = 0
        self.in_flight = 0
        self.leaked: list[bytes] = []
        self.loading: list[str] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
        elif scope["path"] == "/predict":
            await self.predict(scope, receive, send)
        elif scope["path"] == "/health":
            await reply(send, 200, self.health())
        elif scope["path"] == "/metrics":
            await reply(send, 200, "# TYPE fake_answers counter\nfake_answers_total 1.0\n")
        else:
            await reply(send, 200, "pong")

    def health(self) -> str:
        known = {"progress": self.progress, "loading": self.loading, "preloaded": self.preloaded}
        if (told := self.folder / "health.json").exists():
            known |= json.loads(told.read_text())
        return json.dumps(known)

    async def predict(self, scope: Any, receive: Any, send: Any) -> None:
        body = bytearray()
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        self.note(f"start {os.getpid()} {hashlib.sha256(body).hexdigest()}")
        self.in_flight += 1
        try:
            status = await self.obey(bytes(body), receive)
        finally:
            self.in_flight -= 1
        if status is None:
            self.note(f"hung-up {hashlib.sha256(body).hexdigest()}")
            return
        self.progress += 1
        if broken := self.broken(bytes(body)):
            status, headers = BROKEN[broken]
            text = json.dumps({"detail": f"{broken}: as the test wants it"})
            await reply(send, status, text, (b"x-ml-error", broken.encode()), *headers)
            return
        if b"[starve]" in body and status == 503:
            await reply(send, 503, '{"detail": "no memory"}', (b"x-ml-error", b"OutOfMemory"))
            return
        later = [(b"retry-after", b"0")] if b"[later]" in body and status == 503 else []
        await reply(send, status, json.dumps({"digest": hashlib.sha256(body).hexdigest()}), *later)

    async def obey(self, body: bytes, receive: Any) -> int | None:
        """The status to answer with, None when the caller hung up."""
        status = 200
        for word, value in _WORD.findall(body):
            if word == b"hang":
                while (await receive())["type"] != "http.disconnect":
                    pass
                return None
            if word == b"sleep":
                await asyncio.sleep(float(value))
            elif word == b"busy":
                while (self.folder / "busy").exists():
                    await asyncio.sleep(0.005)
            elif word == b"leak":
                self.leaked.append(b"x" * int(value) * 2**20)
            elif word == b"status":
                status = int(value)
            elif word in PASSING:
                status = 503 if (self.folder / PASSING[word]).exists() else 200
            else:
                fail(word, value)
        return status

    def broken(self, body: bytes) -> str:
        for path in self.folder.glob("broken-*"):
            if f'"{path.name.removeprefix("broken-")}"'.encode() in body:
                return path.read_text().strip()
        return ""

    def note(self, line: str) -> None:
        with (self.folder / "journal").open("a") as journal:
            journal.write(line + "\n")


def fail(word: bytes, value: bytes) -> None:
    """Fail as native code does, without a word to the event loop."""
    if word == b"abort":
        os.abort()
    elif word == b"bye":
        os._exit(3)
    elif word == b"block":
        time.sleep(float(value))
    elif word == b"burn":
        end_s = time.monotonic() + float(value)
        while time.monotonic() < end_s:
            pass


async def reply(send: Any, status: int, text: str, *more: tuple[bytes, bytes]) -> None:
    kind = b"application/json" if text.startswith("{") else b"text/plain"
    length = str(len(text)).encode()
    headers = [(b"content-type", kind), (b"content-length", length), *more]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})


def main() -> None:
    folder, socket = Path(sys.argv[1]), Path(sys.argv[2])
    settings = json.loads(read_settings())
    worker = FakeWorker(folder, settings["preload_clip_textual"])
    worker.note(f"born {os.getpid()}")
    worker.note(f"socket {socket}")
    if (folder / "bad-settings").exists():
        sys.exit(EXIT_BAD_SETTINGS)
    if (folder / "refuse").exists():
        sys.exit(7)
    if (folder / "stubborn").exists():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        worker.note(f"helper {subprocess.Popen(['sleep', '3600']).pid}")
    while (folder / "held").exists():
        time.sleep(0.005)
    serve(worker, socket)


if __name__ == "__main__":
    main()
