import platform
from pathlib import Path

import pytest

from immich_ml_metal.tasks.images import ImageLimits, Picture, decode

SHARED = Path(__file__).parents[3] / "shared"
IS_APPLE_SILICON = (platform.system(), platform.machine()) == ("Darwin", "arm64")


@pytest.fixture(autouse=True)
def _on_apple_silicon() -> None:
    if not IS_APPLE_SILICON:
        pytest.skip("needs macOS on Apple Silicon")


@pytest.fixture
def portrait() -> Picture:
    """An upright face and one in profile, from the test pictures outside the repository."""
    path = SHARED / "images/portrait.jpg"
    if not path.is_file():
        pytest.skip(f"needs a picture with an upright face: {path}")
    return decode(path.read_bytes(), ImageLimits(10**9, 10**5))


@pytest.fixture
def detector_file() -> Path:
    """A real SCRFD, to compare Vision's points with."""
    path = SHARED / "models/real/scrfd_500m.onnx"
    if not path.is_file():
        pytest.skip(f"needs an SCRFD detector: {path}")
    return path
