"""What `serve` tells a person: how to go on once it is up, and once a minute how an import goes."""

import asyncio
import contextlib
import logging
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from immich_ml_metal.gateway.asked import TASKS
from immich_ml_metal.gateway.history import History, Kind, Total
from immich_ml_metal.setting_kinds import format_bytes
from immich_ml_metal.settings import Settings
from immich_ml_metal.system.network import urls_of

logger = logging.getLogger(__name__)

MINUTE_S = 60.0
_LOOK_S = 0.2
_IMMICH_READS_WITH = "PP-OCRv5_mobile"  # until an admin chooses another text model


class Teller:
    """Speaks of one gateway; `is_up` says whether its worker has started."""

    def __init__(
        self,
        settings: Settings,
        history: History,
        *,
        is_up: Callable[[], bool],
        port: Callable[[], int],
        minute_s: float = MINUTE_S,
    ) -> None:
        self._settings = settings
        self._history = history
        self._is_up = is_up
        self._port = port
        self._minute_s = minute_s

    async def run(self) -> None:
        """Tell what there is to tell, until cancelled."""
        if sys.stdout.isatty():
            await self._greet()
        before = self._history.copy_totals()
        while True:
            await asyncio.sleep(self._minute_s)
            now = self._history.copy_totals()
            if told := progress(before, now, self._minute_s):
                logger.info("%s", told)
            before = now

    async def _greet(self) -> None:
        is_up = False
        while not is_up:
            await asyncio.sleep(_LOOK_S)
            is_up = self._is_up()
        here = await asyncio.to_thread(models_on_disk, self._settings.models_dir.expanduser())
        urls = await asyncio.to_thread(urls_of, self._settings.host, self._port())
        with contextlib.suppress(OSError):  # the terminal may be gone by now
            sys.stdout.write("\n" + "\n".join(first_lines(self._settings, urls, here)) + "\n\n")
            sys.stdout.flush()


def first_lines(
    settings: Settings, urls: list[str], here: Mapping[str, list[str]]
) -> tuple[str, str, str]:
    """What to do next: type the address into Immich, look at the page, expect a download.

    Args:
        settings: those in force.
        urls: addresses of this service, the best first.
        here: names of the models on disk, by task.
    """
    return (
        f"  Immich    Administration > Settings > Machine Learning Settings > URL: {urls[0]}",
        f"  The page  {urls[0]} in a browser: is it working, and try it on a picture",
        f"  Models    {_downloads(settings, here)}",
    )


def _downloads(settings: Settings, here: Mapping[str, list[str]]) -> str:
    usual = {
        "clip": settings.clip_model,
        "facial-recognition": settings.face_model,
        "ocr": _IMMICH_READS_WITH,
    }
    missing = [name for task, name in usual.items() if name not in here[task]]
    if not missing:
        return f"nothing to download: Immich's usual ones are in {settings.models_dir}"
    from immich_ml_metal.catalog import find_by_name  # brings NumPy, for a terminal only

    sizes = [format_bytes(find_by_name(name).size_bytes) for name in missing]
    names = ", ".join(f"{name} ({size})" for name, size in zip(missing, sizes, strict=True))
    if settings.offline:
        return f"not in {settings.models_dir}, and offline is set: {names}"
    return f"downloaded when Immich first asks, into {settings.models_dir}: {names}"


def progress(before: Mapping[Kind, Total], now: Mapping[Kind, Total], seconds: float) -> str | None:
    """One line about the time between two looks; None when nothing came but searches.

    The rate is that of the kind of work of which most was done: Immich sends each photo to every
    kind, in an order of its own.
    """
    done = {kind: now[kind].answered - before[kind].answered for kind in Kind}
    failed = sum(now[kind].failed - before[kind].failed for kind in Kind)
    names = {Kind.CLIP: "search", Kind.FACES: "faces", Kind.OCR: "text"}
    if not (any(done[kind] for kind in names) or failed):
        return None
    most = max(names, key=lambda kind: done[kind])
    parts = ", ".join(f"{names[kind]} {now[kind].answered}" for kind in names)
    rate = done[most] / seconds
    return f"import: photos done {parts}; now {rate:.1f} per s, {failed} failed in the last minute"


def models_on_disk(folder: Path) -> dict[str, list[str]]:
    """Names of the models that have a graph in Immich's cache layout, by task; blocks."""
    found: dict[str, list[str]] = {}
    for task in TASKS:
        try:
            models = sorted(path for path in (folder / task).iterdir() if path.is_dir())
            found[task] = [path.name for path in models if list(path.glob("*/model.onnx"))]
        except OSError:  # not there, or not ours to read: `models list` says which
            found[task] = []
    return found
