"""Ask a running service every task for real, with the models that are configured."""

import time
from collections.abc import Callable, Collection, Mapping
from contextlib import closing
from dataclasses import dataclass

import numpy as np

from immich_ml_metal.doctor.facts import EngineTest
from immich_ml_metal.parity.client import ModelNames, Refused, Service
from immich_ml_metal.parity.compare import FaceAnswer
from immich_ml_metal.types import Floats, Part, Task

NORM_TOLERANCE = 1e-2  # search vectors are unit vectors
NO_FILES = frozenset({"vision"})  # engines that need no model on disk


@dataclass(frozen=True, slots=True)
class Probe:
    """One task to ask for; `ask` gives what is wrong with the answer, or nothing."""

    title: str
    engine_key: str
    model: str
    ask: Callable[[Service], str]


def probes(names: ModelNames, picture: bytes) -> tuple[Probe, ...]:
    """The four kinds of request that Immich makes."""
    return (
        Probe(
            "search pictures",
            f"{Task.CLIP}/{Part.VISUAL}",
            names.clip,
            lambda service: _not_unit(service.embed_image(picture).answer),
        ),
        Probe(
            "search texts",
            f"{Task.CLIP}/{Part.TEXTUAL}",
            names.clip,
            lambda service: _not_unit(service.embed_text("a self-test").answer),
        ),
        Probe(
            "faces",
            f"{Task.FACES}/{Part.DETECTION}",
            names.faces,
            lambda service: _not_finite(service.find_faces(picture).answer),
        ),
        Probe(
            "text",
            f"{Task.OCR}/{Part.DETECTION}",
            names.ocr,
            lambda service: "" if service.read_text(picture).answer else "it read nothing",
        ),
    )


def run_tests(
    url: str,
    engines: Mapping[str, str],
    missing: Collection[str],
    names: ModelNames,
    picture: bytes,
) -> tuple[EngineTest, ...]:
    """Ask each task twice and time the second time. Nothing is downloaded.

    Args:
        url: of the service.
        engines: `clip/visual` → engine name, as `/health` says.
        missing: names of models that are not on disk; engines that need none are asked anyway.
        names: the models to ask for.
        picture: an encoded picture with text on it.
    """
    tests = []
    with closing(Service(url, names)) as service:
        for probe in probes(names, picture):
            engine = engines.get(probe.engine_key, "?")
            if probe.model in missing and engine not in NO_FILES:
                why = f"not tested: {probe.model} is not downloaded"
                tests.append(EngineTest(probe.title, engine, probe.model, skipped=why))
            else:
                tests.append(_test(service, probe, engine))
    return tuple(tests)


def _test(service: Service, probe: Probe, engine: str) -> EngineTest:
    try:
        error = probe.ask(service)  # the first time loads the model
        started_s = time.perf_counter()
        error = error or probe.ask(service)
    except (Refused, KeyError, ValueError) as exc:
        return EngineTest(probe.title, engine, probe.model, error=str(exc))
    elapsed_s = time.perf_counter() - started_s
    return EngineTest(probe.title, engine, probe.model, seconds=elapsed_s, error=error)


def _not_unit(vector: Floats) -> str:
    length = float(np.linalg.norm(vector))
    fine = abs(length - 1) < NORM_TOLERANCE  # False for NaN as well
    return "" if fine else f"its vector has length {length:.3g}, not 1"


def _not_finite(faces: FaceAnswer) -> str:
    """A drawn face need not be found; what is found must be usable."""
    fine = np.isfinite(faces.embeddings).all() and np.isfinite(faces.boxes).all()
    return "" if fine else "a face vector is not finite"
