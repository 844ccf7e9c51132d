"""Downloads and checks with a bar for each half, and one line for each result."""

from collections.abc import Iterable
from dataclasses import replace

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from immich_ml_metal.catalog import ModelSpec
from immich_ml_metal.errors import ModelError
from immich_ml_metal.models.progress import DownloadProgress, Listener, Phase
from immich_ml_metal.models.shelf import FileState, PartStatus
from immich_ml_metal.models.store import ModelStore
from immich_ml_metal.setting_kinds import format_bytes
from immich_ml_metal.types import ModelKey


def pull_models(store: ModelStore, keys: Iterable[ModelKey]) -> dict[ModelKey, ModelError]:
    """Fetch each half in turn, a failure not stopping the rest; what failed, and why."""
    console = Console(stderr=True)
    with _bars(console) as bars:
        outcomes = {key: _pull_one(store, key, bars) for key in keys}
    return {key: failure for key, failure in outcomes.items() if failure is not None}


def verify_models(
    store: ModelStore, specs: Iterable[ModelSpec], *, online: bool, repair: bool
) -> list[PartStatus]:
    """Check every half that is on disk, and repair it if asked to."""
    console = Console(stderr=True)
    found = []
    with _bars(console) as bars:
        for key in [spec.key(part) for spec in specs for part in spec.parts]:
            status = store.status(key)
            if all(state is FileState.MISSING for state in status.files.values()):
                continue
            bar = bars.add_task(f"checking {key}", total=status.size_bytes)
            status = store.verify(key, online=online)
            if repair and not status.is_usable and status.state is not FileState.UNREADABLE:
                store.repair(key, _follow(bars, bar))
                status = replace(store.verify(key), elsewhere=None)
            bars.remove_task(bar)
            found.append(status)
    return found


def _pull_one(store: ModelStore, key: ModelKey, bars: Progress) -> ModelError | None:
    if store.locate(key) is not None:
        bars.console.print(f"[green]here[/]     {key}")
        return None
    bar = bars.add_task(str(key), total=None)
    try:
        files = store.ensure(key, _follow(bars, bar))
    except ModelError as exc:  # told at once; the other halves are still wanted
        bars.console.print(f"[red]failed[/]   {key}: {exc}", soft_wrap=True)
        return exc
    finally:
        bars.remove_task(bar)
    size = format_bytes(store.status(key).size_bytes)
    bars.console.print(f"[green]fetched[/]  {key}  {size}  {files.folder}", soft_wrap=True)
    return None


def _follow(bars: Progress, bar: TaskID) -> Listener:
    def update(now: DownloadProgress) -> None:
        label = str(now.key) if now.phase is Phase.DOWNLOADING else f"{now.key}: {now.phase}"
        if now.note:
            label += f" ({now.note})"
        total = now.total_bytes or None
        bars.update(bar, description=label, completed=now.done_bytes, total=total)

    return update


def _bars(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,  # it would leave an empty line
    )
