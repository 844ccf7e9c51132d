"""Put the same pictures and texts to two services, one after the other, and compare."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from immich_ml_metal.client.calls import (
    CALL_NAMES,
    CLIP_TEXT,
    FACES,
    TEXT,
    BadAnswer,
    ImmichClient,
    Timed,
)
from immich_ml_metal.parity.compare import (
    Comparison,
    cosine,
    face_agreement,
    line_agreement,
    match_faces,
)
from immich_ml_metal.parity.explain import find_cause
from immich_ml_metal.parity.judge import ParityReport, judge, summarise

TEXTS = (
    "a dog on the beach",
    "sunset over the mountains",
    "birthday cake with candles",
    "red car",
    "children playing in the snow",
    "Weihnachtsbaum",
    "un chat noir",
    "receipt",
    "a person riding a bicycle through the city at night",
    "東京タワー",
)


@dataclass(frozen=True, slots=True)
class Question:
    """One thing to ask both: which call, what about as a person names it, and what is sent."""

    task: str
    subject: str
    payload: bytes | str


def questions(
    photos: Iterable[Path],
    texts: Sequence[str],
    tasks: Sequence[str],
    passed_over: Callable[[OSError], None],
) -> Iterator[Question]:
    """Everything to ask, one picture at a time; one that has gone does not end an hour's work.

    Args:
        photos: the pictures.
        texts: for the search.
        tasks: names of calls.
        passed_over: is told of each picture that cannot be read.
    """
    if CLIP_TEXT in tasks:
        for text in texts:
            yield Question(CLIP_TEXT, text, text)
    for photo in photos:
        try:
            image = photo.read_bytes()
        except OSError as exc:
            passed_over(exc)
            continue
        for task in tasks:
            if task != CLIP_TEXT:
                yield Question(task, str(photo), image)


def compare(question: Question, ours: ImmichClient, theirs: ImmichClient) -> Comparison:
    """Ask both and compare; where both refuse, they agree."""
    first, second = _ask(question, ours), _ask(question, theirs)
    if isinstance(first, str) or isinstance(second, str):
        problem = ""
        if not isinstance(second, str):
            problem = f"ours {first}"
        elif not isinstance(first, str):
            problem = f"theirs {second}"
        return Comparison(question.task, question.subject, None, 0, 0, problem=problem)
    return _measure(question, first, second)


def warm_up(first: Iterable[Question], services: Iterable[ImmichClient]) -> None:
    """Ask each task's first question unrecorded, so that loading a model is not timed."""
    seen: set[str] = set()
    services = list(services)
    for question in first:
        if question.task not in seen:
            seen.add(question.task)
            for service in services:
                _ask(question, service)
        if len(seen) == len(CALL_NAMES):
            return


def conclude(
    comparisons: Sequence[Comparison],
    tasks: Sequence[str],
    ours: ImmichClient,
    theirs: ImmichClient,
) -> ParityReport:
    """Judge what was compared; where search differs, ask both further to find out why."""
    summaries = [summarise(task, [c for c in comparisons if c.task == task]) for task in tasks]
    cause = find_cause(comparisons, summaries, ours, theirs)
    return ParityReport(
        ours.url, theirs.url, tuple(comparisons), tuple(summaries), judge(summaries), cause
    )


def _ask(question: Question, service: ImmichClient) -> Timed | str:
    try:
        return service.ask(question.task, question.payload)
    except BadAnswer as exc:
        return exc.what
    except (KeyError, ValueError, TypeError) as exc:
        return f"answered with something else than Immich expects: {type(exc).__name__}: {exc}"


def _measure(question: Question, ours: Timed, theirs: Timed) -> Comparison:
    measured = partial(
        Comparison, question.task, question.subject, ours_s=ours.seconds, theirs_s=theirs.seconds
    )
    if question.task == FACES:
        match = match_faces(ours.answer, theirs.answer)
        return measured(face_agreement(match), faces=match)
    if question.task == TEXT:
        lines = ours.answer.lines, theirs.answer.lines
        return measured(line_agreement(*lines), lines=lines)
    return measured(cosine(ours.answer, theirs.answer))
