"""The body of `/predict`: a form with `entries` and a picture or a text, read up to a limit."""

from dataclasses import dataclass
from typing import Any

from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from immich_ml_metal import errors

_FORM_OVERHEAD_BYTES = 2**20  # entries, text and boundaries around the largest picture


@dataclass(frozen=True, slots=True)
class Form:
    """What a caller sent; an empty text counts as none."""

    entries: str
    image: bytes | None
    text: str | None


async def read_form(request: Request, *, limit_bytes: int) -> Form:
    """Parse the body while it arrives, and stop reading soon after the limit.

    Raises:
        ImageTooLarge: the picture has more than `limit_bytes`.
        InvalidEntries: the body is not a form, or has no `entries`.
    """
    allowed = limit_bytes + _FORM_OVERHEAD_BYTES
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > allowed:
        raise errors.ImageTooLarge(f"the upload has {length} bytes, limit {limit_bytes}")
    receive, taken = request.receive, 0

    async def limited() -> Any:
        nonlocal taken
        message = await receive()
        taken += len(message.get("body", b""))
        if taken > allowed:
            raise errors.ImageTooLarge(f"the upload has over {taken} bytes, limit {limit_bytes}")
        return message

    counted = Request(request.scope, limited)
    try:
        async with counted.form(max_part_size=_FORM_OVERHEAD_BYTES) as form:
            return Form(
                _entries_field(form), await _image_field(form, limit_bytes), _text_field(form)
            )
    except HTTPException as exc:  # Starlette's word for a body that breaks its own format
        raise errors.InvalidEntries(f"the body is not a form: {exc.detail}") from exc


def _entries_field(form: FormData) -> str:
    value = form.get("entries")
    if isinstance(value, str):
        return value
    if value is None:
        raise errors.InvalidEntries("the form field 'entries' is missing")
    raise errors.InvalidEntries("the form field 'entries' is a file, it must be a text")


async def _image_field(form: FormData, limit_bytes: int) -> bytes | None:
    field = form.get("image")
    if field is None:
        return None
    image = await field.read() if isinstance(field, UploadFile) else field.encode()
    if len(image) > limit_bytes:
        raise errors.ImageTooLarge(f"the image has {len(image)} bytes, limit {limit_bytes}")
    return image


def _text_field(form: FormData) -> str | None:
    text = form.get("text")
    return text if isinstance(text, str) and text else None
