"""Which models suit a machine and its users, and what a model takes in memory."""

import functools
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources

from immich_ml_metal.catalog import MULTILINGUAL, ModelSpec, find_by_name
from immich_ml_metal.models.progress import format_bytes

# Share of the machine's memory that search weights may take; macOS, the other models and whatever
# else runs need the rest.
_SEARCH_SHARE = 0.2
# Bytes of one weight, by engine. MLX computes in fp16 by default; ONNX Runtime on the CPU in fp32.
_WEIGHT_BYTES = {"cpu": 4, "coreml": 4, "mlx": 2}
_EXPORT_WEIGHT_BYTES = 4  # Immich's files are fp32


@dataclass(frozen=True, slots=True)
class Recommendation:
    """One recommended model and why."""

    spec: ModelSpec
    reason: str


def memory_bytes(spec: ModelSpec) -> dict[str, int]:
    """Approximate memory of a model's weights by engine; working memory comes on top.

    Apple Vision is not listed: its models belong to macOS.
    """
    return {
        engine: spec.size_bytes * size // _EXPORT_WEIGHT_BYTES
        for engine, size in _WEIGHT_BYTES.items()
    }


def recommend(
    memory_total_bytes: int, languages: Iterable[str], engine: str
) -> list[Recommendation]:
    """A search model, a face model and a text model for this machine and these languages.

    Args:
        memory_total_bytes: the machine's memory.
        languages: codes as in `de`, `en`, `zh`.
        engine: which engine will run search, `cpu` or `mlx`.
    """
    wanted = frozenset(code.partition("-")[0].lower() for code in languages) or frozenset({"en"})
    return [
        _search_model(memory_total_bytes, wanted, engine),
        Recommendation(
            find_by_name("buffalo_l"), "Immich's default; the largest detector and recogniser"
        ),
        _text_model(wanted),
    ]


def reads(spec: ModelSpec, languages: frozenset[str]) -> bool:
    """Whether a model reads all of these languages."""
    return MULTILINGUAL in spec.languages or languages <= set(spec.languages)


def _search_model(memory_total_bytes: int, wanted: frozenset[str], engine: str) -> Recommendation:
    budget = int(memory_total_bytes * _SEARCH_SHARE)
    shortlist = _shortlists()["english" if wanted == {"en"} else "multilingual"]
    specs = [find_by_name(name) for name in shortlist]
    able = [spec for spec in specs if reads(spec, wanted)] or specs[-1:]
    fitting = [spec for spec in able if memory_bytes(spec)[engine] <= budget]
    spec = fitting[0] if fitting else min(able, key=lambda spec: spec.size_bytes)
    need = format_bytes(memory_bytes(spec)[engine])
    read = "100 languages or more" if MULTILINGUAL in spec.languages else ", ".join(sorted(wanted))
    reason = f"best of Immich's short list that reads {read}; {need} on {engine}"
    if not fitting:
        reason += f", more than the advised {format_bytes(budget)}"
    return Recommendation(spec, reason)


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
