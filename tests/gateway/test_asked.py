"""What a request wants is read from how its upload begins, in however many pieces that comes."""

from typing import Any

import pytest

from immich_ml_metal.gateway.asked import Asked, Upload

NAME = "ViT-B-32__openai"
FORM = (
    b'------formdata-undici-042\r\nContent-Disposition: form-data; name="entries"\r\n\r\n'
    b'{"clip":{"visual":{"modelName":"' + NAME.encode() + b'","options":{}}}}\r\n'
)


@pytest.mark.parametrize("piece_bytes", [1, 64, 5000])
@pytest.mark.parametrize("before_bytes", [0, 3900])
async def test_an_upload_is_known_by_its_first_four_kilobytes(
    piece_bytes: int, before_bytes: int
) -> None:
    body = bytes(before_bytes) + FORM + bytes(10_000)
    pieces = iter(range(0, len(body), piece_bytes))

    async def receive() -> Any:
        at = next(pieces)
        return {"type": "http.request", "body": body[at : at + piece_bytes], "more_body": True}

    upload, passed = Upload(receive), b""
    for _ in range(0, len(body), piece_bytes):
        passed += (await upload())["body"]
    assert upload.asked == Asked(("clip",), NAME)
    assert (passed, len(upload.head)) == (body, 4096)
