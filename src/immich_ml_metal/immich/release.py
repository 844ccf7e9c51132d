"""By hand: resume what the guard has paused, whether the service runs or not."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

from immich_ml_metal.immich.api import ImmichApi, QueueBusy
from immich_ml_metal.immich.records import DOCUMENT, VERSION, Records, claim
from immich_ml_metal.settings import Settings
from immich_ml_metal.state import StateFolder, StateUnusable, default_folder
from immich_ml_metal.types import QUEUES


@dataclass(frozen=True, slots=True)
class Released:
    """Names of queues: those that go on now, and those that somebody else has paused."""

    resumed: tuple[str, ...]
    others: tuple[str, ...]


def state_folder(settings: Settings) -> StateFolder:
    """Where the guard's records lie."""
    return StateFolder(settings.state_dir or default_folder())


def paused_by_us(settings: Settings) -> tuple[str, ...]:
    """The queues that are written down as paused by us; none where that cannot be read."""
    with contextlib.suppress(StateUnusable):
        return tuple(QUEUES[task] for task in Records.load(state_folder(settings)).paused)
    return ()


def release(immich: ImmichApi, folder: StateFolder, *, everything: bool) -> Released:
    """Resume the queues that we paused; with `everything`, whoever paused them.

    A service that runs finds them running and forgets them; otherwise they are forgotten here.

    Raises:
        ImmichError: Immich cannot be asked.
        StateUnusable: what we paused cannot be read (not with `everything`).
    """
    paused = {task for task, queue in immich.queues().items() if queue.is_paused} & QUEUES.keys()
    try:
        ours = set(Records.load(folder).paused)
    except StateUnusable:
        if not everything:
            raise
        ours = set()
    chosen = paused if everything else paused & ours
    for task in sorted(chosen):
        immich.resume(task)
    _forget(folder)
    return Released(_names(chosen), _names(paused - chosen))


def _forget(folder: StateFolder) -> None:
    with contextlib.suppress(StateUnusable), claim(folder):
        records = Records.load(folder)
        if records.paused:
            records.paused.clear()
            folder.write(DOCUMENT, VERSION, records.document())


def _names(tasks: set[str]) -> tuple[str, ...]:
    return tuple(QUEUES[task] for task in sorted(tasks))


def ask_for_missing(immich: ImmichApi, tasks: list[str], tell: Callable[[str, bool], None]) -> bool:
    """Start missing runs, each for itself; whether all were started.

    Args:
        immich: whom to ask.
        tasks: of which tasks.
        tell: is given each queue and whether its run was started.

    Raises:
        ImmichError: Immich cannot be asked.
    """
    done = []
    for task in tasks:
        try:
            immich.start_missing(task)
        except QueueBusy:
            done.append(False)
        else:
            done.append(True)
        tell(QUEUES[task], done[-1])
    return all(done)
