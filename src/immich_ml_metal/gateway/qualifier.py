"""Has the engines checked that the worker has no verdict about, in a process beside it.

Asks the worker what is wanted, starts the process, and lets the worker start anew when another
engine was chosen. Knows nothing about engines. Requests never wait for it.
"""

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

logger = logging.getLogger(__name__)

COMMAND = (sys.executable, "-m", "immich_ml_metal.qualification.background")
_TICK_S = 5.0
_AGAIN_S = 60.0  # after memory was short, or the files of a model were not here yet

Ask = Callable[[], Awaitable[Mapping[str, Any] | None]]


class Qualifier:
    """Event loop only."""

    def __init__(
        self,
        settings_json: str,
        *,
        ask: Ask,
        on_chosen: Callable[[], None],
        command: Sequence[str] = COMMAND,
        tick_s: float = _TICK_S,
        again_s: float = _AGAIN_S,
    ) -> None:
        """Make it.

        Args:
            settings_json: for the process that checks.
            ask: gives the worker's `/health`, None when there is nothing new to learn from it.
            on_chosen: another engine than the one that answers was chosen for some model.
            command: starts the process that checks.
            tick_s: how often to ask.
            again_s: how long to leave a model alone that could not be checked.
        """
        self._settings_json = settings_json
        self._ask = ask
        self._on_chosen = on_chosen
        self._command = command
        self._tick_s = tick_s
        self._again_s = again_s
        self._plan: Mapping[str, Any] = {}  # as the worker told it last
        self._not_before: dict[str, float] = {}
        self.settled: dict[str, str] = {}  # model → who was chosen, in this process's life
        self.checking: tuple[str, ...] = ()

    async def run(self) -> None:
        """Until cancelled. What goes wrong here is logged, and nothing else happens."""
        while True:
            await asyncio.sleep(self._tick_s)
            try:
                await self.look()
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                logger.exception("engines cannot be checked; requests are answered as before")
                await asyncio.sleep(self._again_s)

    async def look(self) -> None:
        """Have checked what waits for it."""
        health = await self._ask()
        if health is not None:
            self._plan = health.get("engine_plan", {})
        now_s = asyncio.get_running_loop().time()
        names = [
            name
            for name in self._plan.get("pending", [])
            if name not in self.settled and self._not_before.get(name, 0.0) <= now_s
        ]
        if names:
            await self._check(names, self._plan.get("serving", {}))

    async def _check(self, names: Sequence[str], serving: Mapping[str, str]) -> None:
        self.checking = tuple(names)
        try:
            told = await self._have_checked(names)
        finally:
            self.checking = ()
        later_s = asyncio.get_running_loop().time() + self._again_s
        self._not_before = dict.fromkeys(names, later_s)
        chosen = {one["model"]: one["chosen"] for one in told if one["chosen"]}
        self.settled |= chosen
        remembered = all(one["remembered"] for one in told)
        changed = [name for name, engine in chosen.items() if serving.get(name) != engine]
        if changed and remembered:
            logger.info("engines were chosen, the worker starts anew models=%s", ",".join(changed))
            self._on_chosen()

    async def _have_checked(self, names: Sequence[str]) -> list[dict[str, Any]]:
        process = await asyncio.create_subprocess_exec(
            *self._command, stdin=PIPE, stdout=PIPE, start_new_session=True
        )
        assert process.stdin is not None
        assert process.stdout is not None
        order = {"settings": self._settings_json, "models": list(names)}
        try:
            process.stdin.write(json.dumps(order).encode() + b"\n")  # stays open: its end ends it
            out = await process.stdout.read()
            await process.wait()
        finally:
            _kill(process)
            await asyncio.shield(process.wait())
        told = [json.loads(line) for line in out.splitlines()]
        if process.returncode:
            logger.warning("the check of engines ended with status %d", process.returncode)
        return told

    def describe(self) -> dict[str, Any]:
        """For `/health`."""
        return {"checking": list(self.checking), "settled": dict(self.settled)}


def _kill(process: Process) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
