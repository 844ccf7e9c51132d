"""The rule: which engines may answer which part of a task, in which order, before any measurement.

What of it is used is decided by what was measured on this machine (`qualification`). Imports no
engine.
"""

import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from immich_ml_metal.catalog import engine_setting
from immich_ml_metal.settings import Settings, env_names
from immich_ml_metal.types import SLOTS, Part, Slot, Task

TEXT_READING: Slot = (Task.OCR, Part.RECOGNITION)
FACE_FINDING: Slot = (Task.FACES, Part.DETECTION)

# What `auto` tries in turn on Apple Silicon, by profile. The CPU follows always.
_PROFILES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "balanced": {
        "clip_engine": ("mlx", "coreml"),
        "face_detection_engine": ("mlx", "coreml"),
        "face_recognition_engine": ("mlx", "coreml"),
        "ocr_engine": ("vision", "mlx"),
    },
    "native": {
        "clip_engine": ("mlx",),
        "face_detection_engine": ("vision", "mlx"),
        "face_recognition_engine": ("coreml", "mlx"),
        "ocr_engine": ("vision", "mlx"),
    },
    "exact": dict.fromkeys(map(engine_setting, SLOTS), ("mlx", "coreml")),
}

# The number formats of each engine, best first: the next one is slower and more exact. `mixed`
# computes products in 16 bits and keeps sums, norms and the residual stream in 32.
FLOAT32 = "float32"
LADDERS: Mapping[str, tuple[str, ...]] = {
    "mlx": ("float16", "mixed", FLOAT32),
    "coreml": ("float16", FLOAT32),
}
OWN_FORMAT = "its own"  # of engines that bring their own models


@dataclass(frozen=True, slots=True)
class Platform:
    """The machine, in `platform`'s words: Darwin and arm64, x86_64, Linux."""

    system: str
    machine: str

    @property
    def is_apple_silicon(self) -> bool:
        """Whether there is a Metal GPU and a Neural Engine to use."""
        return self.system == "Darwin" and self.machine == "arm64"

    def __str__(self) -> str:
        if self.system == "Darwin":
            return "Apple Silicon" if self.is_apple_silicon else f"Mac ({self.machine})"
        return f"{self.system} ({self.machine})"


def this_platform() -> Platform:
    """The machine as the interpreter says: under Rosetta, Apple Silicon counts as an Intel Mac."""
    return Platform(platform.system(), platform.machine())


@dataclass(frozen=True, slots=True)
class Candidate:
    """An engine in one of its number formats."""

    engine: str
    number_format: str = FLOAT32

    @property
    def family(self) -> str:
        """Whose answers it gives: those of Immich's own weights, of Apple's, of open_clip's."""
        return self.engine if self.engine in ("vision", "open_clip") else "immich"

    def __str__(self) -> str:
        return f"{self.engine} {self.number_format}"

    @classmethod
    def parse(cls, text: str) -> "Candidate":
        """Read what `str` gives."""
        engine, _, number_format = text.partition(" ")
        return cls(engine, number_format)


VISION = Candidate("vision", OWN_FORMAT)
REFERENCE = Candidate("cpu")  # what all others are compared with; it needs no verdict


@dataclass(frozen=True, slots=True)
class Rule:
    """What may answer one part of a task.

    Attributes:
        candidates: in order of preference; never empty.
        why: the rule in words; another wording is another wish of the operator's.
        is_explicit: one engine was asked for by name, and no other may answer.
    """

    candidates: tuple[Candidate, ...]
    why: str
    is_explicit: bool = False

    @property
    def needs_verdicts(self) -> bool:
        """Whether there is anything to decide by measuring."""
        return len(self.candidates) > 1


def rule_for(slot: Slot, settings: Settings, machine: Platform) -> Rule:
    """What the settings mean for one part of a task on one kind of machine."""
    setting = engine_setting(slot)
    wanted = getattr(settings, setting)
    if wanted != "auto":
        name = env_names(Settings.model_fields[setting])[0]
        found = tuple(_formats((wanted,), settings, machine))
        return Rule(found, f"asked for by {name}", is_explicit=True)
    if not machine.is_apple_silicon:
        return Rule((REFERENCE,), "portable default")
    order = _PROFILES[settings.profile][setting]
    if not settings.use_coreml:
        order = tuple(engine for engine in order if engine != "coreml")
    found = (*_formats(order, settings, machine), REFERENCE)
    if slot == TEXT_READING:  # Vision reads while it finds: who finds text decides
        found = tuple(one for one in found if one.engine != "vision")
    return Rule(found, f"profile {settings.profile}")


def _formats(order: Iterable[str], settings: Settings, machine: Platform) -> Iterable[Candidate]:
    for engine in order:
        ladder = LADDERS.get(engine, (FLOAT32 if engine == "cpu" else OWN_FORMAT,))
        if engine == "mlx" and settings.mlx_dtype != "auto":
            ladder = (settings.mlx_dtype,)
        elif engine == "mlx" and not machine.is_apple_silicon:
            ladder = (FLOAT32,)  # a CPU has no kernels for 16 bits and is slower with them
        yield from (Candidate(engine, number_format) for number_format in ladder)
