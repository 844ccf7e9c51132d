"""Which models suit a machine and its users, and what a model takes in memory."""

import functools
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from types import MappingProxyType

from immich_ml_metal.catalog import MULTILINGUAL, ModelSpec, find_by_name
from immich_ml_metal.setting_kinds import format_bytes
from immich_ml_metal.types import Part

# Share of the machine's memory that search weights may take; macOS, the other models and whatever
# else runs need the rest.
_SEARCH_SHARE = 0.2
# Bytes of one weight, by engine. MLX computes in fp16 by default; ONNX Runtime on the CPU in fp32.
_WEIGHT_BYTES = {"cpu": 4, "coreml": 4, "mlx": 2}
_EXPORT_WEIGHT_BYTES = 4  # Immich's files are fp32


# What a licence of the catalogue keeps its users from; the others allow every use.
LIMITED = MappingProxyType(
    {
        "CC-BY-NC-4.0": "not for commercial use",
        "apple-amlr": "for research only",
        "insightface": "for non-commercial research only, as all of Immich's face models",
    }
)
_SLOWEST_MS = 2000.0  # a picture; a hundred thousand of them take two days and a half
_PHOTOS = 100_000
_PATCH_PX = re.compile(r"-(14|16|32)(?!\d)")  # in a vision transformer's name; SigLIP's own is 14


@dataclass(frozen=True, slots=True)
class Recommendation:
    """One recommended model, why, and what else to know before it is chosen."""

    spec: ModelSpec
    reason: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Here:
    """This machine and what is set on it.

    Attributes:
        engine: which will run search, `cpu` or `mlx`.
        picture_ms: what `qualify` measured of search models, per picture, by model.
        search_model: the one in the settings, which made the index.
    """

    memory_bytes: int
    engine: str
    picture_ms: Mapping[str, float] = field(default_factory=dict)
    search_model: str = ""

    def pace(self, spec: ModelSpec) -> tuple[float, str] | None:
        """Milliseconds of a picture and how they are known; None where nothing was measured.

        A model that was not measured takes as much longer as it has more arithmetic.
        """
        if spec.name in self.picture_ms:
            return self.picture_ms[spec.name], "measured here"
        for name, known_ms in self.picture_ms.items():
            factor = _arithmetic(spec) / _arithmetic(find_by_name(name))
            return known_ms * factor, f"reckoned from {name}, measured here"
        return None


def _arithmetic(spec: ModelSpec) -> float:
    """What a picture costs in proportion: weights, each used once for every patch."""
    found = _PATCH_PX.search(spec.name)
    patches = ((spec.input_px or 224) / int(found[1] if found else 14)) ** 2
    return spec.part_bytes[Part.VISUAL] * patches


def memory_bytes(spec: ModelSpec) -> dict[str, int]:
    """Approximate memory of a model's weights by engine; working memory comes on top.

    Apple Vision is not listed: its models belong to macOS.
    """
    return {
        engine: spec.size_bytes * size // _EXPORT_WEIGHT_BYTES
        for engine, size in _WEIGHT_BYTES.items()
    }


def recommend(here: Here, languages: Iterable[str]) -> list[Recommendation]:
    """A search model, a face model and a text model for this machine and these languages.

    Args:
        here: the machine.
        languages: codes as in `de`, `en`, `zh`.
    """
    wanted = frozenset(code.partition("-")[0].lower() for code in languages) or frozenset({"en"})
    faces = "Immich's default; the largest detector and recogniser"
    return [
        _search_model(here, wanted),
        Recommendation(find_by_name("buffalo_l"), faces),
        _text_model(wanted),
    ]


def reads(spec: ModelSpec, languages: frozenset[str]) -> bool:
    """Whether a model reads all of these languages."""
    return MULTILINGUAL in spec.languages or languages <= set(spec.languages)


def _search_model(here: Here, wanted: frozenset[str]) -> Recommendation:
    budget = int(here.memory_bytes * _SEARCH_SHARE)
    shortlist = _shortlists()["english" if wanted == {"en"} else "multilingual"]
    specs = [find_by_name(name) for name in shortlist]
    able = [spec for spec in specs if reads(spec, wanted)] or specs[-1:]
    against = {spec.name: _against(spec, here, budget) for spec in able}
    fitting = [spec for spec in able if not against[spec.name]]
    free = [spec for spec in able if spec.licence not in LIMITED]
    spec = fitting[0] if fitting else min(free or able, key=lambda spec: spec.size_bytes)
    need = format_bytes(memory_bytes(spec)[here.engine])
    read = "100 languages or more" if MULTILINGUAL in spec.languages else ", ".join(sorted(wanted))
    reason = f"best of Immich's short list that reads {read}; {need} on {here.engine}"
    if not fitting:
        reason += f"; {against[spec.name]}"
    better = able[: able.index(spec)]
    passed = [f"passed over: {one.name}, {against[one.name]}" for one in better]
    return Recommendation(spec, reason, (*passed, _cost(spec, here)))


def _against(spec: ModelSpec, here: Here, budget: int) -> str:
    """What speaks against a search model on this machine; empty when nothing does."""
    if spec.licence in LIMITED:
        return f"licence {spec.licence}: {LIMITED[spec.licence]}"
    if (need := memory_bytes(spec)[here.engine]) > budget:
        return f"{format_bytes(need)}, more than the advised {format_bytes(budget)}"
    pace = here.pace(spec)
    if pace is not None and pace[0] > _SLOWEST_MS:
        return f"{pace[0] / 1000:.1f} s a picture, {pace[1]}"
    return ""


def _cost(spec: ModelSpec, here: Here) -> str:
    """What the change costs: every photo is looked at again."""
    if spec.name == here.search_model:
        return "it is set already: nothing to do again"
    again = "changing to it means Smart Search for all photos"
    if (pace := here.pace(spec)) is None:
        return f"{again}; how long that takes: immich-ml-metal qualify {spec.name}"
    hours = pace[0] * _PHOTOS / 3_600_000
    return f"{again}, some {hours:.1f} hours for {_PHOTOS:,} ({pace[1]})"


def _text_model(wanted: frozenset[str]) -> Recommendation:
    order = (
        "PP-OCRv6_small",
        "ESLAV__PP-OCRv5_mobile",
        "KOREAN__PP-OCRv5_mobile",
        "EL__PP-OCRv5_mobile",
        "TH__PP-OCRv5_mobile",
    )
    for spec in map(find_by_name, order):
        if reads(spec, wanted):
            return Recommendation(spec, f"reads {', '.join(sorted(wanted))}")
    covered = max(map(find_by_name, order), key=lambda spec: len(wanted & set(spec.languages)))
    missing = ", ".join(sorted(wanted - set(covered.languages)))
    return Recommendation(
        covered, f"no official text model reads all of them; this one lacks {missing}"
    )


@functools.cache
def _shortlists() -> dict[str, list[str]]:
    text = (resources.files("immich_ml_metal") / "catalog.toml").read_text(encoding="utf-8")
    lists: dict[str, list[str]] = tomllib.loads(text)["recommended"]
    return lists
