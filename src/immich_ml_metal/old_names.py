"""Official settings of older servers: read as they were meant, and worth a word."""

from collections.abc import Mapping
from types import MappingProxyType

# The official service dropped these in v3.0; each loads both halves.
OLD_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "MACHINE_LEARNING_PRELOAD__CLIP": "MACHINE_LEARNING_PRELOAD__CLIP__TEXTUAL and __VISUAL",
        "MACHINE_LEARNING_PRELOAD__FACIAL_RECOGNITION": (
            "MACHINE_LEARNING_PRELOAD__FACIAL_RECOGNITION__DETECTION and __RECOGNITION"
        ),
    }
)


def old_names_used(origin: Mapping[str, str]) -> list[str]:
    """A sentence for each old name that a value comes from.

    Args:
        origin: where each setting came from, as `config.resolve` says.
    """
    used = sorted(OLD_NAMES.keys() & set(origin.values()))
    return [
        f"{name} is an old name, which Immich's own service no longer reads; "
        f"set {OLD_NAMES[name]} instead"
        for name in used
    ]
