"""When search vectors differ: find out why, by asking altered pictures.

A service can only be asked, so each suspicion is turned into a question whose answer tells: square
pictures look the same squashed and cropped; a channel-swapped picture undoes a channel swap.
"""

import io

from PIL import Image

from immich_ml_metal.parity.client import Refused
from immich_ml_metal.parity.compare import cosine
from immich_ml_metal.parity.judge import CLIP_SAFE_MIN
from immich_ml_metal.parity.run import Answering

_SIDE_PX = 640


def explain_images(image: bytes, ours: Answering, theirs: Answering) -> str:
    """The most likely cause of a difference on this picture, in words."""
    try:
        picture = Image.open(io.BytesIO(image)).convert("RGB")
        ours_vector, theirs_vector = (
            ours.embed_image(image).answer,
            theirs.embed_image(image).answer,
        )
        if ours_vector.shape != theirs_vector.shape:
            return (
                f"the vectors have {ours_vector.size} and {theirs_vector.size} numbers: "
                "two different models"
            )
        swapped = _encode(Image.merge("RGB", picture.split()[::-1]))
        if cosine(ours.embed_image(swapped).answer, theirs_vector) >= CLIP_SAFE_MIN:
            return "one side swaps red and blue: with the channels swapped the answers agree"
        square = _encode(picture.resize((_SIDE_PX, _SIDE_PX)))
        if (
            cosine(ours.embed_image(square).answer, theirs.embed_image(square).answer)
            >= CLIP_SAFE_MIN
        ):
            return (
                "square pictures agree, so the resize rule differs (crop against squash): "
                "set immich_compat to the other value (3.2 crops, 3.3 squashes)"
            )
    except (Refused, OSError) as exc:
        return f"the cause could not be narrowed down: {exc}"
    return "square pictures differ as well: other weights, another model revision or precision"


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
