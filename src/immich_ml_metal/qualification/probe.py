"""One candidate measured: opened, asked, timed, and compared with the CPU. Runs in a child process.

Both are given the very same blobs: what a model makes of an item may depend on its engine.
"""

import asyncio
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from immich_ml_metal.backends.base import AnyModel, Engine, in_format
from immich_ml_metal.backends.makers import Maker, Surroundings
from immich_ml_metal.backends.selection import FACE_FINDING, REFERENCE
from immich_ml_metal.errors import LoadFailed, ModelUnavailable
from immich_ml_metal.index_guard.guard import IndexGuard
from immich_ml_metal.models.store import ModelStore
from immich_ml_metal.onnx_graph.gap import gap
from immich_ml_metal.qualification.compare import (
    box_gap,
    flatten,
    reading_gap,
    worst,
)
from immich_ml_metal.qualification.order import CHECK, Order
from immich_ml_metal.qualification.plan import ServedFiles
from immich_ml_metal.qualification.samples import WORDS, draw_samples
from immich_ml_metal.qualification.verdict import NOTHING_FOUND, Figures, Outcome, Verdict, judge
from immich_ml_metal.settings import Settings
from immich_ml_metal.system.footprint import memory_bytes
from immich_ml_metal.types import (
    Faces,
    ModelFiles,
    ModelKey,
    Part,
    Reading,
    Slot,
    Task,
    TextRegions,
)

ITEMS = {CHECK: 3, "comparison": 6}
TIMED_S = 2.0  # how long each speed is measured
Say = Callable[[str], None]
Makers = Mapping[str, Maker]


@dataclass(slots=True)
class Answers:
    """What a candidate gave: blobs, the raw answers one by one, and those of a full batch."""

    items: Sequence[Any]
    blobs: list[Any]
    alone: list[Any]
    together: list[Any]
    finish: Callable[[Any, Any], Any]  # raw, item → the task's own answer


async def probe(order: Order, makers: Makers, say: Say) -> Verdict:
    """Measure one candidate; what it raises is for the caller to make a verdict of."""
    settings = Settings.model_validate_json(order.settings_json)
    files = files_of(settings, order.key)
    say("making the engine")
    given = Surroundings(settings, files_of=lambda key: _need(settings, key), is_explicit=True)
    try:
        engine = in_format(makers[order.candidate.engine](given), order.candidate.number_format)
    except (ImportError, LoadFailed) as exc:
        name = exc.name if isinstance(exc, ImportError) else None
        return Verdict(Outcome.UNAVAILABLE, f"{name} cannot be imported" if name else str(exc))
    if order.candidate.engine == "vision":
        return await _probe_vision(order, engine, say)
    assert files is not None
    before = memory_bytes(os.getpid()) or 0
    answers, figures = await _ask(order, engine, files, say)
    grown = max(0, (memory_bytes(os.getpid()) or 0) - before)
    figures = replace(figures, memory_bytes=grown, node_share=_node_share(engine))
    if order.candidate == REFERENCE:
        return Verdict(Outcome.RIGHT, "the reference", figures)
    say("asking the reference")
    reference = makers[REFERENCE.engine](Surroundings(settings))
    model = await reference.device.call(lambda: reference.load(order.key, files))
    theirs = [model.infer([blob])[0] for blob in answers.blobs]
    say("comparing")
    return _compare(order.key, answers, theirs, model, figures)


def files_of(settings: Settings, key: ModelKey) -> ModelFiles | None:
    """The files of a model that the service serves; None when they are not here."""
    store = ModelStore(settings)
    try:
        return ServedFiles(store, IndexGuard(settings)).locate(key)
    finally:
        store.close()


def _need(settings: Settings, key: ModelKey) -> ModelFiles:
    files = files_of(settings, key)
    if files is None:
        raise ModelUnavailable(f"{key} is not on this disk")
    return files


# -- asking ----------------------------------------------------------------------------------------


async def _ask(
    order: Order, engine: Engine, files: ModelFiles, say: Say
) -> tuple[Answers, Figures]:
    samples = draw_samples((order.key.task, order.key.part), ITEMS[order.depth])
    say("opening the model")
    started_s = time.perf_counter()
    model = await engine.device.call(lambda: engine.load(order.key, files))
    blobs = [model.preprocess(item) for item in samples.items]

    def one_by_one() -> list[Any]:
        return [model.infer([blob])[0] for blob in blobs]

    say("running the first item")
    await engine.device.call(lambda: model.infer(blobs[:1]))
    figures = Figures(first_s=time.perf_counter() - started_s)
    say("running one item at a time")
    alone = await engine.device.call(one_by_one)
    batch = [blobs[row % len(blobs)] for row in range(model.max_batch)]
    together: list[Any] = []
    if model.max_batch > 1:
        say(f"running a batch of {model.max_batch}")
        together = list(await engine.device.call(lambda: model.infer(batch)))
    if order.depth != CHECK:
        say("timing")
        figures = await _timed(engine, model, blobs, batch, figures)
    finish = model.postprocess
    await engine.device.call(model.close)
    return Answers(samples.items, blobs, alone, together, finish), figures


async def _timed(
    engine: Engine, model: AnyModel, blobs: list[Any], batch: list[Any], figures: Figures
) -> Figures:
    alone_s = await engine.device.call(lambda: _median_s(lambda: model.infer(blobs[:1])))
    figures = replace(figures, alone_ms=1000 * alone_s, batch=len(batch))
    if len(batch) > 1:
        batch_s = await engine.device.call(lambda: _median_s(lambda: model.infer(batch)))
        figures = replace(figures, batch_ms=1000 * batch_s / len(batch))
    return figures


def _median_s(run: Callable[[], object]) -> float:
    times: list[float] = []
    while sum(times) < TIMED_S or len(times) < 3:
        started_s = time.perf_counter()
        run()
        times.append(time.perf_counter() - started_s)
    return statistics.median(times)


def _node_share(engine: Engine) -> float | None:
    """Of the graph that the accelerator took, where the engine tells (Core ML)."""
    describe = getattr(engine, "describe", None)
    opened = describe().get("opened", []) if describe else []
    return min((float(one["share"]) for one in opened), default=None)


# -- comparing -------------------------------------------------------------------------------------


def _compare(
    key: ModelKey, ours: Answers, theirs: list[Any], reference: AnyModel, figures: Figures
) -> Verdict:
    """Hold every answer, alone and in the batch, against the reference's to the same blob."""
    rows = [*enumerate(ours.alone), *enumerate(ours.together)]
    pairs = [(raw, theirs[row % len(theirs)], row % len(theirs)) for row, raw in rows]
    gaps = [
        gap(a, b)
        for raw, other, _ in pairs
        for a, b in zip(flatten(raw), flatten(other), strict=True)
    ]
    total = worst(gaps)
    figures = replace(
        figures,
        cosine=total.cosine,
        relative_error=total.relative,
        not_finite=total.not_finite,
    )
    slot, note = (key.task, key.part), draw_samples((key.task, key.part), 1).note
    if total.not_finite or slot[0] is Task.CLIP or slot == (Task.FACES, Part.RECOGNITION):
        return judge(slot, figures, note)
    answers = [
        (ours.finish(raw, ours.items[row]), reference.postprocess(other, ours.items[row]))
        for raw, other, row in pairs
    ]
    return _judge_answers(slot, _answer_figures(figures, answers), answers, note)


def _judge_answers(
    slot: Slot, figures: Figures, answers: list[tuple[Any, Any]], note: str
) -> Verdict:
    verdict = judge(slot, figures, note)
    has_found = any(isinstance(b, Reading) or len(b.scores) for _, b in answers)
    if has_found or not verdict.is_usable:
        return verdict
    note = "nothing is found in the samples: raw outputs were compared"
    return judge(slot, verdict.figures, note, NOTHING_FOUND)


def _answer_figures(figures: Figures, answers: list[tuple[Any, Any]]) -> Figures:
    if isinstance(answers[0][0], Reading):
        differ, score = reading_gap([a for a, _ in answers], [b for _, b in answers])
        return replace(figures, texts_differ=differ, score_gap=score)
    found: list[tuple[Faces | TextRegions, Faces | TextRegions]] = answers
    gaps = [box_gap(a, b) for a, b in found]
    return replace(
        figures,
        boxes_differ=sum(one.unmatched for one in gaps),
        box_px=max(one.moved_px for one in gaps),
        score_gap=max(one.score_gap for one in gaps),
    )


# -- Apple Vision ----------------------------------------------------------------------------------

_TIMES = 3


async def _probe_vision(order: Order, engine: Engine, say: Say) -> Verdict:
    """Vision must read drawn words: three times in one process, then from two threads."""
    slot = (order.key.task, order.key.part)
    samples = draw_samples(slot, 1)
    item = samples.items[0]
    say("asking Apple Vision")
    model = await engine.device.call(lambda: engine.load(order.key, None))

    def ask() -> tuple[Any, float]:
        started_s = time.perf_counter()
        raw = model.infer([model.preprocess(item)])[0]
        return model.postprocess(raw, item), time.perf_counter() - started_s

    answers = []
    for number in range(_TIMES):
        say(f"asking Apple Vision, time {number + 1} of {_TIMES}")
        answers.append(await engine.device.call(ask))
    say("asking Apple Vision from two threads")
    answers += await asyncio.gather(engine.device.call(ask), engine.device.call(ask))
    later_s = statistics.median(seconds for _, seconds in answers[1:])
    figures = Figures(first_s=answers[0][1], alone_ms=1000 * later_s)
    if slot == FACE_FINDING:
        return Verdict(Outcome.WORKS, f"it runs; faces are not compared, {samples.note}", figures)
    return _judge_texts([_text_of(found) for found, _ in answers], figures)


def _judge_texts(texts: Sequence[str], figures: Figures) -> Verdict:
    """Right when every drawn word was read, and the same each time."""
    wrong = [text for text in texts if not _is_right(text)]
    if wrong:
        reason = (
            f"read {wrong[0]!r} where {' '.join(WORDS)!r} is drawn, "
            f"{len(wrong)} of {len(texts)} times"
        )
        return Verdict(Outcome.WRONG, reason, figures)
    different = {_squeezed(text): text for text in texts}
    if len(different) > 1:
        first, second, *_ = different.values()
        return Verdict(Outcome.WRONG, f"read {first!r} and then {second!r} in one image", figures)
    return Verdict(Outcome.RIGHT, f"the same words, {len(texts)} times of {len(texts)}", figures)


def _text_of(found: TextRegions) -> str:
    return " ".join(reading.text for reading in found.readings or ())


def _is_right(text: str) -> bool:
    """Every drawn word is there; case and spaces are no matter of being right."""
    return all(_squeezed(word) in _squeezed(text) for word in WORDS)


def _squeezed(text: str) -> str:
    return "".join(text.casefold().split())
