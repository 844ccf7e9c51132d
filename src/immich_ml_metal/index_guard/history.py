"""What the guard remembers, in the state folder: one document of the service's, one of the user's.

A folder that cannot be read or written never stops the service: then nothing is known.
"""

import logging
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from immich_ml_metal.errors import what_ran_out
from immich_ml_metal.index_guard.recipe import Recipe
from immich_ml_metal.onnx_files.derived import digest_files, stamp_files
from immich_ml_metal.onnx_files.references import weight_files
from immich_ml_metal.state import StateFolder, StateUnusable

log = logging.getLogger(__name__)

_INDEX, _ACCEPTED, _VERSION = "index", "index-accepted", 1


class History:
    """By model (`clip/NAME`): what made its vectors, since when. Any thread."""

    def __init__(self, state: StateFolder, *, only_reads: bool = False) -> None:
        """`only_reads` in every process but the service's: it owns the document."""
        self._state = state
        self._only_reads = only_reads
        self._lock = threading.Lock()
        self._told = ""  # the last reason why nothing can be read

    def names(self) -> list[str]:
        """Every model that is remembered."""
        return sorted(self._read(_INDEX).get("models", {}))

    def recall(self, name: str) -> tuple[Recipe, float] | None:
        """The recipe and the unix time since when, or None."""
        try:
            told = self._read(_INDEX)["models"][name]
            return Recipe.from_dict(told["made_by"]), float(told["since"])
        except (KeyError, TypeError, AttributeError, ValueError):
            return None

    def remember(self, name: str, recipe: Recipe) -> None:
        """Take down that vectors are made so from now on."""
        since = max(time.time(), self.accepted_at(name))  # whatever the clock did meanwhile
        row = {"made_by": recipe.as_dict(), "since": since}
        self._change(lambda doc: doc.setdefault("models", {}).update({name: row}))

    def accepted_at(self, name: str) -> float:
        """Unix time at which the user last accepted a change of this model; 0 never."""
        try:
            return float(self._read(_ACCEPTED)["models"][name])
        except (KeyError, TypeError, ValueError):
            return 0.0

    def accept(self, name: str) -> None:
        """Take down that the user wants what the settings say.

        Raises:
            StateUnusable: the folder cannot be written.
        """
        known = self.recall(name)
        after = math.nextafter(known[1], math.inf) if known is not None else 0.0
        when = max(time.time(), after)  # a clock that was set back must not undo the user's word
        models = {**self._read(_ACCEPTED).get("models", {}), name: when}
        self._state.write(_ACCEPTED, _VERSION, {"models": models})

    def digest(self, graph: Path) -> str:
        """Digest of a graph with its weights; files are read again only when they changed.

        Raises:
            OSError, NotOnnx: they cannot be read.
        """
        files = weight_files(graph)
        stamp = stamp_files(files)
        known = self._read(_INDEX).get("digests", {}).get(str(graph))
        if known is not None and known["stamp"] == stamp:
            return str(known["digest"])
        digest = digest_files(files)
        row = {"stamp": stamp, "digest": digest}
        self._change(lambda doc: doc.setdefault("digests", {}).update({str(graph): row}))
        return digest

    def last_start(self) -> tuple[str, bool]:
        """Whose points aligned faces at the last start, and whether Vision could find faces."""
        told = self._read(_INDEX).get("last_start", {})
        return str(told.get("points", "")), bool(told.get("has_vision", True))

    def note_start(self, points: str, *, has_vision: bool) -> None:
        """Take down with what this start aligns faces, for the commands."""
        row = {"points": points, "has_vision": has_vision}
        if self.last_start() != (points, has_vision):
            self._change(lambda doc: doc.update({"last_start": row}))

    def tell_once(self, start: str, texts: list[str]) -> list[str]:
        """Those of `texts` that were not told yet in this start of the service."""
        told = self._read(_INDEX).get("told", {})
        before = told.get("texts", []) if told.get("start") == start else []
        fresh = [text for text in texts if text not in before]
        if fresh:
            row = {"start": start, "texts": [*before, *fresh]}
            self._change(lambda doc: doc.update({"told": row}))
        return fresh

    def _read(self, name: str) -> dict[str, Any]:
        try:
            return self._state.read(name, _VERSION) or {}
        except StateUnusable as exc:
            if (short := what_ran_out(exc)) is not None:  # it is known, and can be read later
                raise short from exc
            if str(exc) != self._told:
                log.warning("what made the index is not known: %s", exc)
            self._told = str(exc)
            return {}

    def _change(self, change: Callable[[dict[str, Any]], None]) -> None:
        def changed(document: dict[str, Any]) -> dict[str, Any]:
            change(document)
            return document

        if self._only_reads:
            return
        with self._lock:
            try:
                self._state.change(_INDEX, _VERSION, changed)
            except StateUnusable as exc:
                log.warning("what makes the index is not remembered: %s", exc)
