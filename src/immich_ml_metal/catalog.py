"""What every official model is: family, task, dimension, size, licence; the data of `catalog.toml`.

Knows nothing about disks or networks. An unknown name is an error; it is never replaced by another.
"""

import difflib
import functools
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from importlib import resources
from types import MappingProxyType
from typing import Any

from immich_ml_metal.errors import ConfigError, UnknownModel
from immich_ml_metal.types import SLOTS, ModelKey, Part, Slot, Task

OPEN_CLIP_PREFIX = "open_clip/"  # spells out a model of open_clip's that has no Immich export
MULTILINGUAL = "multilingual"  # stands for about a hundred languages or more


class Family(StrEnum):
    """Which export a model comes from, and so how it is fed."""

    OPENCLIP = "openclip"
    MCLIP = "mclip"
    INSIGHTFACE = "insightface"
    PADDLE = "paddle"


TASK_OF = MappingProxyType(
    {
        Family.OPENCLIP: Task.CLIP,
        Family.MCLIP: Task.CLIP,
        Family.INSIGHTFACE: Task.FACES,
        Family.PADDLE: Task.OCR,
    }
)
PARTS_OF = MappingProxyType(
    {task: tuple(part for of, part in SLOTS if of is task) for task in Task}
)
_IN_SETTINGS = MappingProxyType({Task.CLIP: "clip", Task.FACES: "face", Task.OCR: "ocr"})
_WHAT = MappingProxyType(
    {Task.CLIP: "a search model", Task.FACES: "a face model", Task.OCR: "a text model"}
)


def model_setting(task: Task) -> str:
    """The setting that names a task's model: `face_model`."""
    return f"{_IN_SETTINGS[task]}_model"


def engine_setting(slot: Slot) -> str:
    """The setting that names the engine of a half: faces are found and told apart by two."""
    task, part = slot
    half = f"_{part}" if task is Task.FACES else ""
    return f"{_IN_SETTINGS[task]}{half}_engine"


def preload_setting(slot: Slot) -> str:
    """The setting that names the models whose half is loaded at start: `preload_face_detection`."""
    task, part = slot
    return f"preload_{_IN_SETTINGS[task]}_{part}"


@dataclass(frozen=True, slots=True)
class PinnedFile:
    """One file on ModelScope: its path in RapidOCR's repository and the digest it must have."""

    path: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One official model.

    Attributes:
        dim: length of its vectors; None for a text model.
        input_px: side of the square it looks at; None where the picture's own shape is used.
        resize_mode: `shortest` or `squash` for search models, as an export made today would say.
        tokenizer: the Hugging Face repository its tokenizer comes from.
        context_length: tokens of one text.
        languages: codes of the languages it reads, or `multilingual`; empty for faces.
        licence: of the weights, as their publisher states it; `unknown` where none is stated.
        part_bytes: approximate size of each half on disk.
        pinned: for text models, the files used for the revision `main`.
    """

    name: str
    family: Family
    task: Task
    dim: int | None
    input_px: int | None
    resize_mode: str | None
    tokenizer: str | None
    context_length: int | None
    languages: tuple[str, ...]
    licence: str
    part_bytes: Mapping[Part, int]
    pinned: Mapping[Part, PinnedFile]

    @property
    def size_bytes(self) -> int:
        """Approximate size of all halves on disk."""
        return sum(self.part_bytes.values())

    @property
    def parts(self) -> tuple[Part, ...]:
        """The halves of this model."""
        return PARTS_OF[self.task]

    def key(self, part: Part) -> ModelKey:
        """The key of one half."""
        return ModelKey(self.task, part, self.name)


def clean_name(raw: str) -> str:
    """Reduce a name as sent to the catalogue's spelling, exactly as the official service does.

    >>> clean_name("immich-app/ViT-B-32::openai")
    'ViT-B-32__openai'
    """
    return re.sub(r"[:\\]", "_", raw.rsplit("/", 1)[-1]).replace(".", "")


def all_models() -> tuple[ModelSpec, ...]:
    """Every official model, in the catalogue's order."""
    return tuple(_catalog().values())


def get_model(name: str) -> ModelSpec | None:
    """The model of exactly that name; None when no official model has it."""
    return _catalog().get(name)


def find_by_name(raw_name: str) -> ModelSpec:
    """The model of that name, whatever its task.

    Raises:
        UnknownModel: no official model has this name.
    """
    name = clean_name(raw_name)
    spec = get_model(name)
    if spec is None:
        near = _near_names(name)
        hint = f"; near names: {', '.join(near)}" if near else ""
        raise UnknownModel(f"unknown model {raw_name!r}{hint}")
    return spec


def _near_names(name: str) -> list[str]:
    """At most three names that somebody may have meant: spelt alike, else with this in them."""
    names = {known.lower(): known for known in _catalog()}
    close = difflib.get_close_matches(name.lower(), names, n=3)
    close += [known for known in names if name and name.lower() in known]
    return [names[known] for known in dict.fromkeys(close)][:3]


def find_model(raw_name: str, task: Task, part: Part) -> ModelSpec:
    """The model of that name, if it does `task` and has the half `part`.

    Raises:
        UnknownModel: no official model has this name, or it is for something else.
    """
    spec = find_by_name(raw_name)
    if spec.task is not task or part not in spec.parts:
        raise UnknownModel(f"{raw_name!r} is {_WHAT[spec.task]}, it cannot do {task} {part}")
    return spec


def model_key(raw_name: str, task: Task, part: Part) -> ModelKey:
    """The key of one half, under its cleaned name; an `open_clip/` name keeps its spelling.

    Raises:
        UnknownModel: as `find_model`.
    """
    is_official = clean_name(raw_name) in _catalog()  # then the prefix is just a folder, as ever
    if task is Task.CLIP and raw_name.startswith(OPEN_CLIP_PREFIX) and not is_official:
        return ModelKey(task, part, raw_name)
    return find_model(raw_name, task, part).key(part)


def key_of_setting(setting: str, name: str, slot: Slot) -> ModelKey:
    """The key of one half of the model that a setting names.

    Raises:
        ConfigError: it is no official model of that kind.
    """
    try:
        return model_key(name, *slot)
    except UnknownModel as exc:
        raise ConfigError(f"{setting}: {exc}") from exc


@functools.cache
def _catalog() -> Mapping[str, ModelSpec]:
    text = (resources.files("immich_ml_metal") / "catalog.toml").read_text(encoding="utf-8")
    return parse_catalog(text)


def parse_catalog(text: str) -> Mapping[str, ModelSpec]:
    """Build the specs from TOML.

    Raises:
        ValueError: an entry is incomplete or contradicts itself; the message names it.
    """
    data = tomllib.loads(text)
    specs: dict[str, ModelSpec] = {}
    for family in Family:
        for name, row in data.get(family, {}).items():
            if name in specs or name != clean_name(name):
                raise ValueError(f"{name}: listed twice, or not a clean name")
            try:
                specs[name] = _parse_row(name, family, row, data)
            except KeyError as exc:
                raise ValueError(f"{name}: {exc} is missing") from exc
    return MappingProxyType(specs)


def _parse_row(
    name: str, family: Family, row: Mapping[str, Any], data: Mapping[str, Any]
) -> ModelSpec:
    task = TASK_OF[family]
    pinned = _pinned(row, data["modelscope"]) if family is Family.PADDLE else {}
    sizes = {part: file.size_bytes for part, file in pinned.items()} or {
        part: row[f"{part}_bytes"] for part in PARTS_OF[task]
    }
    languages = row["languages"]
    spec = ModelSpec(
        name=name,
        family=family,
        task=task,
        dim=None if task is Task.OCR else row["dim"],
        input_px=None if task is Task.OCR else row["px"],
        resize_mode=row["resize"] if task is Task.CLIP else None,
        tokenizer=row["tokenizer"] if task is Task.CLIP else None,
        context_length=row["context"] if task is Task.CLIP else None,
        languages=(MULTILINGUAL,)
        if languages == MULTILINGUAL
        else tuple(data["languages"][languages]),
        licence=row["licence"],
        part_bytes=MappingProxyType(sizes),
        pinned=MappingProxyType(pinned),
    )
    _check(spec)
    return spec


def _pinned(row: Mapping[str, Any], files: Mapping[str, Any]) -> dict[Part, PinnedFile]:
    def pin(key: str) -> PinnedFile:
        file = files[row[key]]
        return PinnedFile(file["path"], file["sha256"], file["bytes"])

    return {Part.DETECTION: pin("det"), Part.RECOGNITION: pin("rec")}


def _check(spec: ModelSpec) -> None:
    if spec.resize_mode not in (None, "shortest", "squash"):
        raise ValueError(f"{spec.name}: unknown resize mode {spec.resize_mode!r}")
    numbers = [spec.dim, spec.input_px, spec.context_length, *spec.part_bytes.values()]
    if any(number is not None and number <= 0 for number in numbers):
        raise ValueError(f"{spec.name}: dimensions and sizes must be positive")
    if any(not re.fullmatch(r"[0-9a-f]{64}", file.sha256) for file in spec.pinned.values()):
        raise ValueError(f"{spec.name}: a SHA-256 is malformed")
