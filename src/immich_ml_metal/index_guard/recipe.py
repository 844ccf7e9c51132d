"""How vectors are made: all that decides their values, and what it means when it changes."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from immich_ml_metal.onnx_files.activation import NONE, read_activation
from immich_ml_metal.tasks.clip import VisualConfig
from immich_ml_metal.types import ModelFiles, ModelKey, Part, Task

_GELU = {"erf": "erf GELU", "tanh": "tanh GELU", "quick": "QuickGELU", NONE: "no GELU"}
_POINTS = {"vision": "Apple Vision's points", "immich": "the points of Immich's detector"}
JOBS = {
    Task.CLIP: "run Smart Search for all photos in Immich",
    Task.FACES: "run Face Detection and Facial Recognition for all photos in Immich",
}


@dataclass(frozen=True, slots=True)
class Half:
    """What one half of a model computes.

    Attributes:
        graph: digest of the graph with its weights.
        activation: as `read_activation` names it.
        preparation: resize mode, filter, side, mean and std of pictures; empty for other halves.
    """

    graph: str
    activation: str
    preparation: str = ""


@dataclass(frozen=True, slots=True)
class Recipe:
    """What makes a model's vectors.

    Attributes:
        points: whose five points align faces, `immich` or `vision`; empty for search.
        halves: by part.
    """

    revision: str
    compat: str
    points: str
    halves: Mapping[str, Half]

    def as_dict(self) -> dict[str, Any]:
        """For the state folder."""
        return asdict(self)

    @classmethod
    def from_dict(cls, told: Mapping[str, Any]) -> "Recipe":
        """Read what `as_dict` gave.

        Raises:
            KeyError, TypeError: it is something else.
        """
        halves = {part: Half(**half) for part, half in told["halves"].items()}
        return cls(told["revision"], told["compat"], told["points"], halves)


def read_half(key: ModelKey, files: ModelFiles, graph: str, compat: str) -> Half:
    """What the files of one half compute; `graph` is their digest.

    Raises:
        OSError, ValueError, LoadFailed: they cannot be read.
    """
    preparation = ""
    if (key.task, key.part) == (Task.CLIP, Part.VISUAL):
        text = (files.folder / "preprocess_cfg.json").read_bytes()
        config = VisualConfig.parse(json.loads(text), compat=compat)
        mean, std = (",".join(f"{x:g}" for x in values) for values in (config.mean, config.std))
        preparation = (
            f"{config.resize_mode} {config.resample.name.lower()} {config.side_px} px "
            f"mean {mean} std {std}"
        )
    return Half(graph, read_activation(files.graph), preparation)


def differences(made: Recipe, now: Recipe) -> list[str]:
    """In words, what `now` would do otherwise; the names of revision and server do not matter."""
    found = []
    for part, half in made.halves.items():
        other = now.halves.get(part)
        if other is None:
            continue
        if half.activation != other.activation:
            was, is_now = (_GELU.get(x, x) for x in (half.activation, other.activation))
            found.append(
                f"were made with {was} (revision {made.revision}); {now.revision} uses {is_now}"
            )
        elif half.graph != other.graph:
            found.append(
                f"were made by another file of the {part} half (revision {made.revision}); "
                f"whether {now.revision} gives the same vectors is not known"
            )
        if half.preparation != other.preparation:
            found.append(
                f"were made from pictures prepared as {half.preparation} (Immich {made.compat}); "
                f"now it would be {other.preparation}"
            )
    if made.points != now.points:
        was, is_now = (_POINTS.get(x, x) for x in (made.points, now.points))
        found.append(f"were made from faces aligned by {was}; now it would be {is_now}")
    return list(dict.fromkeys(found))


def way_out(task: Task, made: Recipe, now: Recipe) -> str:
    """What the user can do: compute everything anew, or go back."""
    back = []
    if made.revision != now.revision:
        back.append(f"set ML_MODEL_REVISION={made.revision}")
    if made.compat != now.compat:
        back.append(f"set ML_IMMICH_COMPAT={made.compat}")
    if made.points != now.points:
        engine = "vision" if made.points == "vision" else "cpu (or mlx)"
        back.append(f"set ML_FACE_DETECTION_ENGINE={engine}")
    return f"{JOBS[task]}, or {' and '.join(back) or 'put the former files back'}"
