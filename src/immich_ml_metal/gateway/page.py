"""`/ui`: the page for people. Static files of the package, and the facts that `/health` lacks.

Read-only. It asks for `/health`, `/ui/state.json` and, in the playground, `/predict`.
"""

import asyncio
import hashlib
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from immich_ml_metal.gateway.history import History
from immich_ml_metal.gateway.http import Receive, Send, reply, reply_json
from immich_ml_metal.gateway.terminal import models_on_disk
from immich_ml_metal.settings import Settings
from immich_ml_metal.system.network import urls_of

_TYPES = {
    ".html": b"text/html; charset=utf-8",
    ".css": b"text/css; charset=utf-8",
    ".js": b"text/javascript; charset=utf-8",
    ".svg": b"image/svg+xml",
}
# Scripts and styles of ours only, pictures that were dropped into the page, no frame around it.
_POLICY = (
    b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    b"connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_SAFE = [
    (b"content-security-policy", _POLICY),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-cache"),
]
_MOVED = [(b"location", b"/ui/"), (b"vary", b"accept"), (b"cache-control", b"no-store")]


class Page:
    """The ASGI app below `/ui`.

    `worker_told` gives the `/health` of the worker that was asked last, empty before the first.
    """

    def __init__(
        self,
        settings: Settings,
        history: History,
        worker_told: Callable[[], Mapping[str, Any]],
        *,
        port: Callable[[], int],
    ) -> None:
        self._settings = settings
        self._history = history
        self._worker_told = worker_told
        self._port = port
        self._files = _read_files()
        self._has_loaded = False

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer one GET at or below `/ui`."""
        name = scope["path"].removeprefix("/ui").removeprefix("/") or "index.html"
        if scope["path"] == "/ui":
            await reply(send, 308, _MOVED, b"")
        elif name == "state.json":
            await reply_json(send, 200, await self._state(), *_SAFE)
        elif name in self._files:
            await self._send_file(name, dict(scope["headers"]), send)
        else:
            await reply_json(send, 404, {"detail": "Not Found"})

    def note_models(self, is_loaded: bool) -> None:
        """Remember for the first steps that a model was loaded once."""
        self._has_loaded = self._has_loaded or is_loaded

    async def _send_file(self, name: str, headers: Mapping[bytes, bytes], send: Send) -> None:
        content, tag = self._files[name]
        if headers.get(b"if-none-match") == tag:
            await reply(send, 304, [*_SAFE, (b"etag", tag)], b"")
            return
        kind = (b"content-type", _TYPES[Path(name).suffix])
        await reply(send, 200, [kind, *_SAFE, (b"etag", tag)], content)

    async def _state(self) -> dict[str, Any]:
        totals = self._history.totals.values()
        answered = sum(total.answered for total in totals)
        asked = answered + sum(total.failed for total in totals)
        usual = self._settings
        return {
            **self._history.describe(),
            "addresses": urls_of(usual.host, self._port()),
            "engines": engines_of(self._worker_told()),
            "models": {
                "usual": {
                    "clip": usual.clip_model,
                    "facial-recognition": usual.face_model,
                    "ocr": usual.ocr_model,
                },
                "on_disk": await asyncio.to_thread(models_on_disk, usual.models_dir.expanduser()),
            },
            "steps": {
                "asked": asked > 0,
                "model": self._has_loaded or answered > 0,
                "answered": answered > 0,
            },
        }


def engines_of(told: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Slot → engine with its number format, and the verdict by which it was chosen. Any: JSON."""
    plan = told.get("engine_plan", {})
    engines = {slot: {"engine": str(engine)} for slot, engine in told.get("engines", {}).items()}
    for slot, one in plan.get("tasks", {}).items():
        verdict = (
            "to be checked"
            if f"{slot}/{one['model']}" in plan.get("pending", ())
            else one["reason"]
        )
        engines[slot] = {"engine": f"{one['engine']} {one['number_format']}", "verdict": verdict}
    return engines


def send_to_page(headers: Mapping[bytes, bytes]) -> bool:
    """Whether `/` is asked for by a browser that wants to show something."""
    return b"text/html" in headers.get(b"accept", b"")


async def redirect(send: Send) -> None:
    """Send a browser to the page."""
    await reply(send, 302, _MOVED, b"")


def is_foreign(headers: Mapping[bytes, bytes]) -> bool:
    """Whether a page of another site made a browser send this: its Origin is not our Host.

    Immich, curl and monitors send no Origin.
    """
    origin = headers.get(b"origin")
    return origin is not None and origin.partition(b"://")[2] != headers.get(b"host", b"")


def _read_files() -> dict[str, tuple[bytes, bytes]]:
    """Name → content and entity tag."""
    folder = resources.files("immich_ml_metal.gateway") / "ui"
    contents = {
        entry.name: entry.read_bytes()
        for entry in folder.iterdir()
        if Path(entry.name).suffix in _TYPES
    }
    return {
        name: (content, b'"%s"' % hashlib.sha256(content).hexdigest()[:16].encode())
        for name, content in contents.items()
    }
