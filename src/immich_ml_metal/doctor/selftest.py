"""Ask a running service every task for real, with the models that are configured."""

from collections.abc import Callable, Collection, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from immich_ml_metal.client.calls import (
    CLIP_IMAGE,
    CLIP_TEXT,
    FACES,
    TEXT,
    BadAnswer,
    FaceAnswer,
    ImmichClient,
    ModelNames,
    TextAnswer,
    immich_calls,
)
from immich_ml_metal.client.own_service import (
    NotServing,
    ServiceDidNotStart,
    ask_health,
    local_url,
    running_service,
)
from immich_ml_metal.doctor.facts import EngineTest, Facts
from immich_ml_metal.drawing import draw_preview
from immich_ml_metal.types import Floats

NORM_TOLERANCE = 1e-2  # search vectors are unit vectors
NO_FILES = frozenset({"vision"})  # engines that need no model on disk


@dataclass(frozen=True, slots=True)
class SelfTest:
    """One task to ask for.

    Attributes:
        engine_key: where `/health` names the engine.
        fault: what is wrong with an answer; empty when nothing is.
    """

    title: str
    engine_key: str
    model: str
    call: str
    payload: bytes | str
    fault: Callable[[Any], str]


def self_tests(names: ModelNames, picture: bytes) -> tuple[SelfTest, ...]:
    """The four kinds of request that Immich makes."""
    calls = immich_calls(names)

    def test(title: str, call: str, payload: bytes | str, fault: Callable[[Any], str]) -> SelfTest:
        task, model, first = calls[call].task, calls[call].model, calls[call].parts[0]
        return SelfTest(title, f"{task}/{first}", model, call, payload, fault)

    return (
        test("search pictures", CLIP_IMAGE, picture, _not_unit),
        test("search texts", CLIP_TEXT, "a self-test", _not_unit),
        test("faces", FACES, picture, _not_finite),
        test("text", TEXT, picture, _nothing_read),
    )


def run_self_test(facts: Facts, options: Mapping[str, str]) -> tuple[EngineTest, ...]:
    """Ask the running service, or one started with `options` in a process of its own."""
    missing = {model.name for model in facts.models if model.problem or not model.is_present}
    picture = draw_preview(0)
    try:
        if facts.port.state == "ours":
            return run_tests(local_url(facts.settings), missing, facts.names, picture)
        with running_service(options) as started:
            return run_tests(started.url, missing, facts.names, picture)
    except (ServiceDidNotStart, NotServing) as exc:
        return (EngineTest("service", "-", "-", error=str(exc)),)


def run_tests(
    url: str, missing: Collection[str], names: ModelNames, picture: bytes
) -> tuple[EngineTest, ...]:
    """Ask each task once: how fast and how exact it is, `qualify` says. Nothing is downloaded.

    What is on disk is asked first: that starts a worker that was stopped for being idle, and only
    a worker tells its engines. Then those without files are asked whose engine needs none.

    Args:
        url: of the service.
        missing: names of models that are not on disk.
        names: the models to ask for.
        picture: an encoded picture with text on it.

    Raises:
        NotServing: the service does not say what it is.
    """
    tests = self_tests(names, picture)
    with closing(ImmichClient(url, names)) as client:
        found = {t: _run(client, t) for t in tests if t.model not in missing}
        engines = ask_health(url).engines
        for test in tests:
            engine = engines.get(test.engine_key, "?")
            if test not in found and engine in NO_FILES:
                found[test] = _run(client, test)
            elif test not in found:
                why = f"not tested: {test.model} is not downloaded"
                found[test] = EngineTest(test.title, engine, test.model, skipped=why)
    return tuple(replace(found[test], engine=engines.get(test.engine_key, "?")) for test in tests)


def _run(client: ImmichClient, test: SelfTest) -> EngineTest:
    result = EngineTest(test.title, "?", test.model)
    try:
        error = test.fault(client.ask(test.call, test.payload).answer)
    except (BadAnswer, KeyError, TypeError, ValueError) as exc:
        return replace(result, error=exc.what if isinstance(exc, BadAnswer) else str(exc))
    return replace(result, error=error)


def _nothing_read(text: TextAnswer) -> str:
    return "" if text.lines else "it read nothing"


def _not_unit(vector: Floats) -> str:
    length = float(np.linalg.norm(vector))
    fine = abs(length - 1) < NORM_TOLERANCE  # False for NaN as well
    return "" if fine else f"its vector has length {length:.3g}, not 1"


def _not_finite(faces: FaceAnswer) -> str:
    """A drawn face need not be found; what is found must be usable."""
    fine = np.isfinite(faces.embeddings).all() and np.isfinite(faces.boxes).all()
    return "" if fine else "a face vector is not finite"
