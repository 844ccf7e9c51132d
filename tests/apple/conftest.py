import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

from immich_ml_metal.tasks.images import ImageLimits, Picture, decode

SHARED = Path(__file__).parents[3] / "shared"
IS_APPLE_SILICON = (platform.system(), platform.machine()) == ("Darwin", "arm64")


REPORT = Path("apple-report.txt")
LINES: list[str] = []  # what the tests measured, for the report


@pytest.fixture(autouse=True)
def _on_apple_silicon(request: pytest.FixtureRequest) -> None:
    if not (IS_APPLE_SILICON or getattr(request.module, "RUNS_ON_LINUX", False)):
        pytest.skip("needs macOS on Apple Silicon")


@pytest.fixture
def report() -> Callable[[str], None]:
    """Takes a line for the report that `make apple` ends with; nothing private goes into it."""
    return LINES.append


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Write and show the report: what a Mac's owner can share with us."""
    if not LINES:
        return
    counts = {
        kind: len(terminalreporter.stats.get(kind, ())) for kind in ("passed", "failed", "skipped")
    }
    failed = [one.nodeid for one in terminalreporter.stats.get("failed", ())]
    versions = ", ".join(f"{name} {version(name)}" for name in ("mlx", "onnxruntime"))
    text = [
        f"## {platform.machine()}, macOS {platform.mac_ver()[0] or 'none'}, "
        f"Python {platform.python_version()}, {versions}",
        ", ".join(f"{number} {kind}" for kind, number in counts.items()),
        *(f"FAILED {name}" for name in failed),
        "```",
        *sorted(LINES),
        "```",
    ]
    REPORT.write_text("\n".join(text) + "\n", encoding="utf-8")
    terminalreporter.write_line(f"Report to share: {REPORT}")
    terminalreporter.write_line("\n".join(text))


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
