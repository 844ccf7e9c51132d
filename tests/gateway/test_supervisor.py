"""The life of the worker process, without any request."""

import asyncio
import os
import signal
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from doubles.gateway import fake_worker, is_alive, read_journal, settings
from doubles.timing import until

from immich_ml_metal.gateway.crashes import CrashRecord
from immich_ml_metal.gateway.process import WorkerProcess, describe
from immich_ml_metal.gateway.supervisor import End, Order, Supervisor, WorkerState


class Life:
    """A supervisor, and what it told."""

    def __init__(self, command: Sequence[str]) -> None:
        self.ends: list[End] = []
        self.ready = 0
        self.crashes = CrashRecord(max_crashes=5, window_s=300)
        self.supervisor = Supervisor(
            command,
            settings().model_dump_json(),
            crashes=self.crashes,
            on_ready=self._on_ready,
            on_end=self.ends.append,
        )

    def _on_ready(self) -> None:
        self.ready += 1

    @property
    def worker(self) -> WorkerProcess:
        assert self.supervisor.worker is not None
        return self.supervisor.worker


@asynccontextmanager
async def living(command: Sequence[str]) -> AsyncIterator[Life]:
    life = Life(command)
    running = asyncio.create_task(life.supervisor.run())
    try:
        yield life
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_no_worker_runs_before_one_is_wanted(tmp_path: Path) -> None:
    async with living(fake_worker(tmp_path)) as life:
        await until(lambda: life.supervisor.state is WorkerState.IDLE)
        await asyncio.sleep(0.05)
        assert read_journal(tmp_path, "born") == []


async def test_an_worker_is_stopped_politely_and_leaves_no_zombie(tmp_path: Path) -> None:
    async with living(fake_worker(tmp_path)) as life:
        life.supervisor.wake()
        await until(lambda: life.ready)
        pid = life.worker.pid
        life.supervisor.end(Order("idle", again=False))
        await until(lambda: life.supervisor.state is WorkerState.IDLE)
        assert not is_alive(pid)  # a zombie would still count as alive
        assert life.ends == [End("idle", fault=False)]
        assert len(life.crashes.failures) == 0


async def test_a_wish_for_an_worker_during_its_stop_starts_the_next_one(tmp_path: Path) -> None:
    async with living(fake_worker(tmp_path)) as life:
        life.supervisor.wake()
        await until(lambda: life.ready == 1)
        life.supervisor.end(Order("idle", again=False))
        life.supervisor.wake()
        await until(lambda: life.ready == 2)


@pytest.mark.parametrize(
    ("number", "end"),
    [
        (signal.SIGKILL, End("SIGKILL", fault=True, from_outside=True)),
        (signal.SIGTERM, End("exit status 0", fault=True, from_outside=True)),
        (signal.SIGABRT, End("SIGABRT", fault=True)),
    ],
)
async def test_an_worker_that_dies_is_replaced_and_its_signal_is_told(
    tmp_path: Path, number: signal.Signals, end: End
) -> None:
    async with living(fake_worker(tmp_path)) as life:
        life.supervisor.wake()
        await until(lambda: life.ready == 1)
        os.kill(life.worker.pid, number)
        await until(lambda: life.ready == 2)
        assert life.ends == [end]


async def test_a_command_that_cannot_run_is_a_failure_with_a_reason() -> None:
    async with living(["/nonexistent/worker"]) as life:
        life.supervisor.wake()
        await until(lambda: len(life.ends) >= 2)
        assert life.ends[0] == End("cannot start: No such file or directory", fault=True)


async def test_only_the_first_of_several_orders_counts(tmp_path: Path) -> None:
    async with living(fake_worker(tmp_path)) as life:
        life.supervisor.wake()
        await until(lambda: life.ready == 1)
        life.supervisor.end(Order("hang", fault=True))
        life.supervisor.end(Order("idle", again=False))
        await until(lambda: life.ready == 2)
        assert life.ends == [End("hang", fault=True)]


async def test_an_worker_is_ended_while_it_starts(tmp_path: Path) -> None:
    (tmp_path / "held").touch()
    async with living(fake_worker(tmp_path)) as life:
        life.supervisor.wake()
        await until(lambda: read_journal(tmp_path, "born"))
        pid = life.worker.pid
        life.supervisor.end(Order("asked", again=False))
        await until(lambda: life.supervisor.state is WorkerState.IDLE)
        assert not is_alive(pid)


@pytest.mark.parametrize("moment", ["born", "ready"])
async def test_cancelling_the_supervisor_ends_the_worker(tmp_path: Path, moment: str) -> None:
    async with living(fake_worker(tmp_path)) as life:
        life.supervisor.wake()
        if moment == "ready":
            await until(lambda: life.ready)
        await until(lambda: read_journal(tmp_path, "born"))
        pid, folder = life.worker.pid, life.worker.socket.parent
    assert not is_alive(pid)
    assert not folder.exists()


async def test_a_child_that_ignores_sigterm_is_killed_with_its_helpers(tmp_path: Path) -> None:
    (tmp_path / "stubborn").touch()
    (tmp_path / "held").touch()
    worker = await WorkerProcess.start(
        fake_worker(tmp_path), settings().model_dump_json(), tmp_path / "s"
    )
    await until(lambda: read_journal(tmp_path, "helper"))
    [helper] = read_journal(tmp_path, "helper")
    assert await worker.stop(0.1) == -signal.SIGKILL
    await until(lambda: not is_alive(int(helper)), "the helper's end")


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (0, "exit status 0"),
        (7, "exit status 7"),
        (-6, "SIGABRT"),
        (70, "out of memory"),
        (-99, "signal 99"),
    ],
)
def test_an_exit_status_has_a_name(status: int, text: str) -> None:
    assert describe(status) == text


async def test_a_worker_starts_after_the_system_tidied_its_empty_folder_away(
    tmp_path: Path,
) -> None:
    async with living(fake_worker(tmp_path)) as life:
        life.supervisor.wake()
        await until(lambda: life.ready == 1)
        folder = life.worker.socket.parent
        life.supervisor.end(Order("idle", again=False))
        await until(lambda: life.supervisor.state is WorkerState.IDLE)
        folder.rmdir()
        life.supervisor.wake()
        await until(lambda: life.ready == 2)
        anew = life.worker.socket.parent
        assert anew.stat().st_mode & 0o777 == 0o700
    assert not anew.exists()


async def test_a_socket_is_reached_whatever_the_length_or_fate_of_the_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("a" * 60) / ("b" * 60)
    deep.mkdir(parents=True)
    gone = Path("/tmp/immich-ml-gone")
    for temporary in (deep, gone):
        monkeypatch.setattr(tempfile, "tempdir", str(temporary))
        async with living(fake_worker(tmp_path)) as life:
            life.supervisor.wake()
            await until(lambda: life.ready)
            assert len(str(life.worker.socket)) < 104
