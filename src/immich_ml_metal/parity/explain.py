"""When search vectors differ: find out why, by asking altered pictures.

A service can only be asked, so each suspicion is turned into a question whose answer tells: square
pictures look the same squashed and cropped; a channel-swapped picture undoes a channel swap.
"""

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from immich_ml_metal.client.calls import CLIP_IMAGE, CLIP_TEXT, BadAnswer, ImmichClient
from immich_ml_metal.parity.compare import Comparison, cosine
from immich_ml_metal.parity.judge import CLIP_SAFE_MIN, Difference, TaskSummary
from immich_ml_metal.types import Floats

_SIDE_PX = 640


def find_cause(
    comparisons: Sequence[Comparison],
    summaries: Sequence[TaskSummary],
    ours: ImmichClient,
    theirs: ImmichClient,
) -> str:
    """The most likely cause where search vectors must not be mixed; empty where they may."""
    unsafe = [s for s in summaries if s.level is Difference.UNSAFE and s.minimum is not None]
    bad = {summary.task for summary in unsafe}
    if CLIP_IMAGE in bad:
        answered = [c for c in comparisons if c.task == CLIP_IMAGE and c.value is not None]
        worst = min(answered, key=lambda c: c.value or 0.0)
        try:
            image = Path(worst.subject).read_bytes()
        except OSError as exc:  # it has gone since it was sent
            return f"not looked for: {exc.filename}: {exc.strerror}"
        return explain_images(image, ours, theirs)
    if CLIP_TEXT in bad:
        return explain_texts(any(s.task == CLIP_IMAGE for s in summaries))
    return ""


def explain_images(image: bytes, ours: ImmichClient, theirs: ImmichClient) -> str:
    """The most likely cause of a difference on this picture, in words."""
    try:
        picture = Image.open(io.BytesIO(image)).convert("RGB")
        mine, other = _vector(ours, image), _vector(theirs, image)
        if mine.shape != other.shape:
            return f"the vectors have {mine.size} and {other.size} numbers: two different models"
        swapped = _encode(Image.merge("RGB", picture.split()[::-1]))
        if cosine(_vector(ours, swapped), other) >= CLIP_SAFE_MIN:
            return "one side swaps red and blue: with the channels swapped the answers agree"
        square = _encode(picture.resize((_SIDE_PX, _SIDE_PX)))
        if cosine(_vector(ours, square), _vector(theirs, square)) >= CLIP_SAFE_MIN:
            return (
                "square pictures agree, so the resize rule differs (crop against squash): "
                "set immich_compat to the other value (3.2 crops, 3.3 squashes)"
            )
    except (BadAnswer, OSError) as exc:
        return f"the cause could not be narrowed down: {exc}"
    return "square pictures differ as well: other weights, another model revision or precision"


def _vector(service: ImmichClient, image: bytes) -> Floats:
    vector: Floats = service.ask(CLIP_IMAGE, image).answer
    return vector


def explain_texts(image_agrees: bool) -> str:
    """The most likely cause when texts differ."""
    if image_agrees:
        return "pictures agree, texts do not: another tokenizer, text canonicalisation or language"
    return "pictures and texts differ: other weights, or another model under the same name"


def _encode(picture: Image.Image) -> bytes:
    """PNG, because a JPEG would add differences of its own."""
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()
