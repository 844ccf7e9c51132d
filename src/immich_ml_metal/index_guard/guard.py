"""Compares what made an index with what this start would make, and keeps what is at hand.

Vectors of two recipes cannot be compared: search gets worse and duplicates appear, and nothing says
so. So a change by itself changes nothing; the user accepts it, or goes back.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from immich_ml_metal.catalog import clean_name, get_model
from immich_ml_metal.errors import LoadFailed, what_ran_out
from immich_ml_metal.index_guard.history import History
from immich_ml_metal.index_guard.recipe import Half, Recipe, differences, read_half, way_out
from immich_ml_metal.models.shelf import Shelf
from immich_ml_metal.settings import Settings
from immich_ml_metal.state import StateFolder
from immich_ml_metal.types import ModelFiles, ModelKey, Task

log = logging.getLogger(__name__)

GUARDED = frozenset({Task.CLIP, Task.FACES})  # text that was read is stored, and never compared


@dataclass(frozen=True, slots=True)
class IndexFinding:
    """What is known of one model's index.

    Attributes:
        model: `clip/ViT-B-32__openai`.
        state: `unknown` without a history, never taken for `same`.
        served: `as before` while a change waits for the user, else `as set`.
    """

    model: str
    state: Literal["same", "changed", "unknown"]
    served: Literal["as set", "as before"]
    text: str

    def as_dict(self) -> dict[str, Any]:
        """For `/health` and `--json`."""
        return asdict(self)


class IndexGuard:
    """The guard of one start. Any thread; reads files, so not on the event loop."""

    def __init__(self, settings: Settings, points: str = "", *, has_vision: bool = True) -> None:
        """Guard what a start serves, or look at it from a command.

        Args:
            settings: as the service has them.
            points: whose points align faces in this start, `immich` or `vision`; empty in a
                command, which goes by the last start and writes nothing.
            has_vision: whether Apple Vision could find faces in this start.
        """
        self._settings = settings
        self._models_dir = settings.models_dir.expanduser()
        self._is_off = settings.index_guard == "off"
        self.history = History(StateFolder(settings.state_folder), only_reads=not points)
        if points and not self._is_off:
            self.history.note_start(points, has_vision=has_vision)
        elif not points:
            points, has_vision = self.history.last_start()
        self._points, self._has_vision = points, has_vision

    def files(self, key: ModelKey, find: Callable[[ModelKey], ModelFiles]) -> ModelFiles:
        """The files to load: those that `find` gives, or those that made the index.

        What is loaded for the first time, or by the user's wish, is remembered.
        """
        if self._is_off or key.task not in GUARDED:
            return find(key)
        if (kept := self.held(_name(key))) is not None:
            return self._kept_files(key, kept)
        files = find(key)
        self._take_down(key, files)
        return files

    def locate(
        self, key: ModelKey, find: Callable[[ModelKey], ModelFiles | None]
    ) -> ModelFiles | None:
        """The files that `files` would load, if they are here; remembers nothing.

        Looks closer only where another revision may be kept: of one revision there is one file.
        """
        known = self.history.recall(_name(key)) if key.task in GUARDED else None
        if self._is_off or known is None or known[0].revision == self._settings.model_revision:
            return find(key)
        kept = self.held(_name(key))
        return find(key) if kept is None else self._kept_files(key, kept)

    def _kept_files(self, key: ModelKey, kept: Recipe) -> ModelFiles:
        return replace(self._shelf(kept.revision).files(key), compat=kept.compat)

    def held(self, name: str) -> Recipe | None:
        """The recipe that goes on being served although the settings say otherwise."""
        if (made := self._kept(name)) is None:
            return None
        now = self.recipe_now(name, made)
        is_elsewhere = made.revision != now.revision and not made.halves.keys() <= now.halves.keys()
        return made if is_elsewhere or differences(made, now) else None  # nothing need be fetched

    def _kept(self, name: str) -> Recipe | None:
        """What made an index, while the user wants it kept and it is at hand."""
        if self._settings.index_guard != "hold" or (known := self.history.recall(name)) is None:
            return None
        made, since = known
        is_accepted = self.history.accepted_at(name) > since
        return None if is_accepted or not self._is_at_hand(name, made) else made

    def held_points(self) -> str:
        """Whose points aligned the faces of the index, while it is kept; or empty.

        The model of the settings decides; others are asked where nothing is known of it.
        """
        configured = f"{Task.FACES}/{clean_name(self._settings.face_model)}"
        others = [name for name in self.history.names() if name.startswith(Task.FACES)]
        found = (self._kept(name) for name in [configured, *others])
        return next((made.points for made in found if made is not None), "")

    def finding(self, name: str) -> IndexFinding:
        """What is known of one model."""
        known = self.history.recall(name)
        if known is None:
            text = f"what made the vectors of {_short(name)} in Immich is not known here"
            return IndexFinding(name, "unknown", "as set", f"{text}; it is remembered from now on")
        made, since = known
        now = self.recipe_now(name, made)
        found = differences(made, now)
        day = time.strftime("%Y-%m-%d", time.localtime(since))
        if not found and made.revision != now.revision and not now.halves:
            found = [
                f"were made by revision {made.revision}; what {now.revision} computes is not "
                "known until it is here"
            ]
        if not found:
            text = f"vectors of {_short(name)} are made as they were since {day}"
            return IndexFinding(name, "same", "as set", f"{text}; before that is not known")
        return self._changed(name, made, now, found)

    def findings(self, names: Sequence[str] = ()) -> list[IndexFinding]:
        """What is known of every remembered model, and of `names`."""
        if self._is_off:
            return []
        return [self.finding(name) for name in dict.fromkeys([*self.history.names(), *names])]

    def tell(self, start: str) -> None:
        """Log every change, once for each start of the service."""
        texts = [one.text for one in self.findings() if one.state == "changed"]
        for text in self.history.tell_once(start, texts):
            log.warning("index: %s", text)

    def recipe_now(self, name: str, made: Recipe | None = None) -> Recipe:
        """What the settings would make, of the halves that are on disk."""
        points = self._points or (made.points if made is not None else "")
        revision, compat = self._settings.model_revision, self._settings.immich_compat
        is_search = name.startswith(Task.CLIP)
        return Recipe(revision, compat, "" if is_search else points, self._halves(name))

    def _halves(self, name: str) -> dict[str, Half]:
        shelf, halves = self._shelf(self._settings.model_revision), {}
        for key in _keys(name):
            half = self._read(key, shelf.files(key), self._settings.immich_compat)
            if half is not None:
                halves[str(key.part)] = half
        return halves

    def _read(self, key: ModelKey, files: ModelFiles, compat: str) -> Half | None:
        try:
            return read_half(key, files, self.history.digest(files.graph), compat)
        except (OSError, ValueError, LoadFailed) as exc:
            if what_ran_out(exc):  # it may be here, and its index must not get other vectors
                raise
            return None  # not here, or torn: whoever loads it says so

    def _take_down(self, key: ModelKey, files: ModelFiles) -> None:
        """Remember what is about to be served, unless a change waits for the user's word."""
        half = self._read(key, files, self._settings.immich_compat)
        if half is None:
            return
        name, part = _name(key), str(key.part)
        now = self.recipe_now(name)
        known = self.history.recall(name)
        if known is None:
            self.history.remember(name, replace(now, halves={part: half}))
        elif self.history.accepted_at(name) > known[1]:
            self.history.remember(name, replace(now, halves={**now.halves, part: half}))
        elif part not in known[0].halves and not differences(known[0], now):
            self.history.remember(name, replace(now, halves={**known[0].halves, part: half}))

    def _is_at_hand(self, name: str, made: Recipe) -> bool:
        """Whether every half that made the index is on disk as it was."""
        if made.points == "vision" and not self._has_vision:
            return False
        shelf = self._shelf(made.revision)
        keys = [key for key in _keys(name) if str(key.part) in made.halves]
        found = {str(key.part): self._read(key, shelf.files(key), made.compat) for key in keys}
        return bool(found) and found == dict(made.halves)

    def _changed(self, name: str, made: Recipe, now: Recipe, found: list[str]) -> IndexFinding:
        task = Task(name.partition("/")[0])
        said = f"vectors of {_short(name)} {', and '.join(found)}: {way_out(task, made, now)}"
        if self.held(name) is None:
            why = "is not kept" if self._settings.index_guard == "warn" else "is not at hand"
            return IndexFinding(name, "changed", "as set", f"{said}; what the index has {why}")
        until = f"immich-ml-metal models accept {_short(name)}"
        return IndexFinding(
            name, "changed", "as before", f"{said}; what the index has is served until `{until}`"
        )

    def _shelf(self, revision: str) -> Shelf:
        return Shelf(self._models_dir, revision)


def _name(key: ModelKey) -> str:
    return f"{key.task}/{key.name}"


def _short(name: str) -> str:
    return name.partition("/")[2]


def _keys(name: str) -> list[ModelKey]:
    """The halves of a remembered model that is in the catalogue."""
    task, _, model = name.partition("/")
    spec = get_model(model)
    return [] if spec is None or spec.task != task else [spec.key(part) for part in spec.parts]
