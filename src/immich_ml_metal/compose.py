"""The composition root: settings → engine app, with its engines and its model store."""

from fastapi import FastAPI

from immich_ml_metal.config import Settings
from immich_ml_metal.server import create_app, every_part
from immich_ml_metal.store import ModelStore


def build_app(settings: Settings) -> FastAPI:
    """The engine app as `serve` runs it."""
    from immich_ml_metal.backends.ort import OrtEngine

    return create_app(settings, every_part(OrtEngine(settings)), ModelStore(settings))
