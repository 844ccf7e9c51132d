"""The models that are loaded when a worker starts, before anybody asks for them."""

import logging
from typing import Protocol

from immich_ml_metal.catalog import key_of_setting, preload_setting
from immich_ml_metal.errors import ServiceError
from immich_ml_metal.settings import Settings
from immich_ml_metal.types import SLOTS, ModelKey, Part

logger = logging.getLogger(__name__)


def preload_keys(settings: Settings) -> tuple[ModelKey, ...]:
    """What the settings want loaded, in the order in which it is loaded.

    Raises:
        ConfigError: a name is no official model of that kind.
    """
    texts_first = sorted(SLOTS, key=lambda slot: slot[1] is not Part.TEXTUAL)  # people wait there
    keys = [
        key_of_setting(preload_setting(slot), name, slot)
        for slot in texts_first
        for name in getattr(settings, preload_setting(slot))
    ]
    return tuple(dict.fromkeys(keys))


class Loader(Protocol):
    """The part of the pool that loads."""

    def serves(self, key: ModelKey) -> bool:
        """Whether any engine runs this half."""
        ...

    async def get(self, key: ModelKey) -> object:
        """Load the model.

        Raises:
            ModelError: it cannot be fetched or loaded.
        """
        ...


async def preload(pool: Loader, keys: tuple[ModelKey, ...]) -> None:
    """Load one model after the other; what cannot be loaded now is left to its first request."""
    for key in keys:
        if not pool.serves(key):
            continue
        try:
            await pool.get(key)
        except ServiceError as exc:
            logger.warning("preload failed model=%s reason=%s", key, exc)
