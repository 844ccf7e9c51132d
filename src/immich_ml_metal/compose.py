"""The composition root: settings → engine app, with its engines and its model store."""

import logging

from starlette.types import ASGIApp

from immich_ml_metal.catalog import find_by_name
from immich_ml_metal.config import Settings
from immich_ml_metal.server import create_app, every_part
from immich_ml_metal.store import ModelStore

log = logging.getLogger(__name__)


def build_app(settings: Settings) -> ASGIApp:
    """The engine app as `serve` runs it; says which of the configured models are here."""
    from immich_ml_metal.backends.ort import OrtEngine

    store = ModelStore(settings)
    report_models(settings, store)
    return create_app(settings, every_part(OrtEngine(settings)), store)


def report_models(settings: Settings, store: ModelStore) -> None:
    """Log each configured model as present, or as missing with the way to get it."""
    for name in (settings.clip_model, settings.face_model, settings.ocr_model):
        spec = find_by_name(name)
        missing = [part for part in spec.parts if store.locate(spec.key(part)) is None]
        if not missing:
            log.info("model is here model=%s", spec.name)
            continue
        size_mib = sum(spec.part_bytes[part] for part in missing) / 2**20
        log.warning(
            "model is missing model=%s parts=%s size_mib=%.0f: it is %s; to get it now, run "
            "immich-ml-metal models pull %s",
            spec.name,
            ",".join(missing),
            size_mib,
            "not fetched while offline" if settings.offline else "fetched when first asked for",
            spec.name,
        )
