"""The verdicts of this machine, kept in the state folder; one entry per half of a model.

A damaged or unwritable folder costs what was remembered, never the service: `trouble` says so.
"""

import fcntl
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

from immich_ml_metal.backends.selection import Candidate
from immich_ml_metal.onnx_files.derived import Stamp
from immich_ml_metal.qualification.verdict import Judged, Verdict
from immich_ml_metal.state import StateDamaged, StateFolder, StateUnusable
from immich_ml_metal.types import ModelKey, Part, Task

log = logging.getLogger(__name__)

DOCUMENT, VERSION = "engines", 1


@dataclass(frozen=True, slots=True)
class Entry:
    """What is known of one half of a model.

    Attributes:
        stamp, digest: of the weights that the verdicts are about.
        chosen: the last good choice.
        chosen_under: the rule it was chosen under, in words.
    """

    stamp: Stamp = field(default_factory=dict)
    digest: str = ""
    judged: Mapping[Candidate, Judged] = field(default_factory=dict)
    chosen: Candidate | None = None
    chosen_under: str = ""

    def with_verdict(self, judged: Judged) -> "Entry":
        """This, and one verdict more; an older one about the same candidate goes."""
        return replace(self, judged={**self.judged, judged.candidate: judged})


class Record:
    """Entries by model. Each change is read, changed and written under a lock."""

    def __init__(self, folder: StateFolder) -> None:
        self._folder = folder
        self.trouble = ""  # why nothing can be remembered; empty when all is well
        self._is_damaged = False  # the document, which a change then begins anew

    def entries(self) -> dict[str, Entry]:
        """All that is remembered; nothing where it cannot be read, and `trouble` says why."""
        try:
            document = self._folder.read(DOCUMENT, VERSION) or {}
            entries = {name: _entry(stored) for name, stored in document.get("models", {}).items()}
        except StateDamaged as exc:
            return self._note(str(exc), is_damaged=True)
        except StateUnusable as exc:
            return self._note(str(exc))
        except (ValueError, KeyError, TypeError, AttributeError) as exc:
            path = self._folder.path / f"{DOCUMENT}.json"
            return self._note(f"{path} is damaged ({exc!r})", is_damaged=True)
        self.trouble = ""
        return entries

    def change(self, key: ModelKey, change: Callable[[Entry], Entry]) -> Entry:
        """Change the entry of a model. What cannot be written is logged and given all the same."""
        with self._locked():
            entries = self.entries()
            entry = change(entries.get(name_of(key), Entry()))
            entries[name_of(key)] = entry
            stored = {name: _stored(entry) for name, entry in entries.items()}
            try:
                if self._is_damaged:
                    self._folder.set_aside(DOCUMENT)
                elif self.trouble:  # rather no memory than a newer release's document overwritten
                    return entry
                self._folder.write(DOCUMENT, VERSION, {"models": stored})
                self.trouble, self._is_damaged = "", False
            except StateUnusable as exc:
                self._note(str(exc))
        return entry

    def _note(self, trouble: str, *, is_damaged: bool = False) -> dict[str, Entry]:
        self._is_damaged = is_damaged
        if trouble != self.trouble:
            log.warning("verdicts on engines are not remembered: %s", trouble)
        self.trouble = trouble
        return {}

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One change at a time, of the service and of `qualify` beside it."""
        with ExitStack() as stack:
            with suppress(OSError, StateUnusable):  # `write` will say why
                lock = stack.enter_context(self._folder.open_lock(f".{DOCUMENT}"))
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def key_of(name: str) -> ModelKey:
    """The key that an entry is about.

    Raises:
        ValueError: it is not called as `name_of` calls it.
    """
    task, part, model = name.split("/", 2)
    return ModelKey(Task(task), Part(part), model)


def name_of(key: ModelKey) -> str:
    """What an entry is called: `clip/visual/ViT-B-32__openai`."""
    return f"{key.task}/{key.part}/{key.name}"


def _stored(entry: Entry) -> dict[str, Any]:
    return {
        "stamp": entry.stamp,
        "digest": entry.digest,
        "chosen": str(entry.chosen) if entry.chosen else None,
        "chosen_under": entry.chosen_under,
        "verdicts": {
            str(judged.candidate): {
                **judged.verdict.as_dict(),
                "facts": dict(judged.facts),
                "depth": judged.depth,
            }
            for judged in entry.judged.values()
        },
    }


def _entry(stored: Mapping[str, Any]) -> Entry:
    judged = [
        Judged(Candidate.parse(name), Verdict.from_dict(one), dict(one["facts"]), one["depth"])
        for name, one in stored["verdicts"].items()
    ]
    chosen = stored["chosen"]
    return Entry(
        stamp=dict(stored["stamp"]),
        digest=str(stored["digest"]),
        judged={one.candidate: one for one in judged},
        chosen=Candidate.parse(chosen) if chosen else None,
        chosen_under=str(stored["chosen_under"]),
    )
