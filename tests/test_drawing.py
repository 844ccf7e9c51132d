import io

import numpy as np
import pytest
from PIL import Image, JpegImagePlugin

from immich_ml_metal.drawing import PREVIEW_SIZE, draw_face, draw_preview, to_jpeg


@pytest.fixture(scope="module")
def preview() -> bytes:
    return draw_preview(7)


def test_a_preview_has_the_form_of_immichs(preview: bytes) -> None:
    image = Image.open(io.BytesIO(preview))
    assert isinstance(image, JpegImagePlugin.JpegImageFile)
    assert (image.size, image.mode) == ((2160, 1440), "RGB")
    assert min(PREVIEW_SIZE) == 1440  # what Immich makes of the shorter side
    assert JpegImagePlugin.get_sampling(image) == 0  # 4:4:4
    reference = io.BytesIO()
    Image.new("RGB", (8, 8)).save(reference, "JPEG", quality=80)
    expected = Image.open(reference)
    assert isinstance(expected, JpegImagePlugin.JpegImageFile)
    assert image.quantization == expected.quantization


def test_a_preview_is_as_large_as_a_photographs(preview: bytes) -> None:
    assert 100_000 < len(preview) < 1_500_000  # Immich's are 12 to 645 kB


def test_a_seed_always_draws_the_same_picture(preview: bytes) -> None:
    assert draw_preview(7) == preview
    assert draw_preview(8) != preview


def test_a_preview_holds_dark_letters_on_a_pale_field(preview: bytes) -> None:
    grey = np.asarray(Image.open(io.BytesIO(preview)).convert("L"))
    field = grey[1000:1400, 100:1000]
    assert np.median(field) > 200
    assert 0.005 < np.mean(field < 60) < 0.2


def test_a_face_is_drawn_where_it_is_asked_for() -> None:
    image = Image.new("RGB", (400, 400), "white")
    draw_face(image, (200, 150), 100)
    pixels = np.asarray(image)
    rows, columns = np.nonzero((pixels < 250).any(axis=2))
    assert 140 <= columns.min() < columns.max() <= 260
    assert 80 <= rows.min() < rows.max() <= 270
    skin = pixels[165, 185].astype(int)  # a cheek
    assert skin[0] > skin[1] > skin[2]


def test_a_picture_comes_back_from_its_jpeg() -> None:
    image = Image.new("RGB", (32, 16), (200, 40, 30))
    decoded = Image.open(io.BytesIO(to_jpeg(image)))
    np.testing.assert_allclose(np.asarray(decoded), np.asarray(image), atol=3)
