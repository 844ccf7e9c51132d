"""Photographs the page for the README and the docs: the real page, real answers, drawn text.

Run by `make pictures`. Needs Chromium from the system's packages. Text is read by the model that
comes with the installation; search and faces would need other weights, so they are left out.
"""

import io
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Literal

from PIL import Image
from playwright.sync_api import (
    Browser,
    FilePayload,
    Page,
    Playwright,
    Route,
    expect,
    sync_playwright,
)

from immich_ml_metal.client.calls import TEXT, ImmichClient, configured_names
from immich_ml_metal.client.own_service import running_service
from immich_ml_metal.drawing import draw_preview
from immich_ml_metal.settings import Settings

FOLDER = Path(__file__).parents[1] / "docs" / "pictures"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
MAX_BYTES = 150_000
COLOURS = 128  # of the pages' few; photographs in them lose nothing that a reader would miss
BUSY_S = 75.0  # more than a minute, so that the chart has more than one bar
PATIENCE_MS = 60_000


def main() -> None:
    """Write docs/pictures/*.png."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with service() as url, sync_playwright() as playwright:
        browser = find_browser(playwright)
        keep_busy(url)
        for scheme in ("light", "dark"):
            show_state(browser, url, scheme)
            show_text(browser, url, scheme)
        browser.close()


def find_browser(playwright: Playwright) -> Browser:
    """The system's Chromium; ends the script where there is none."""
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        sys.exit("Chromium is needed: apt install chromium, or brew install --cask chromium")
    return playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])


@contextmanager
def service() -> Iterator[str]:
    """A service with nothing but the text model of the installation."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.toml"
        config.write_text(f'offline = true\nstate_dir = "{folder}/state"\n')
        options = {"--models-dir": f"{folder}/models", "--config": str(config)}
        with running_service(options) as own:
            yield own.url


def keep_busy(url: str) -> None:
    """Ask what an import asks, two at once as Immich does."""
    end_s = time.monotonic() + BUSY_S

    def ask(seed: int) -> None:
        with closing(ImmichClient(url, configured_names(Settings()), timeout_s=300)) as client:
            while time.monotonic() < end_s:
                client.ask(TEXT, draw_preview(seed))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(ask, (1, 2)))


def open_page(
    browser: Browser, url: str, scheme: Literal["light", "dark"], *, width: int = 1000
) -> Page:
    """The page as a person sees it, after its first answers."""
    page = browser.new_page(
        viewport={"width": width, "height": 760}, color_scheme=scheme, locale="en-GB"
    )
    page.route("**/predict", only_text)
    page.goto(f"{url}/ui/")
    expect(page.locator("#state-word")).to_have_text("Working", timeout=PATIENCE_MS)
    return page


def only_text(route: Route) -> None:
    """Let through what the installation has a model for."""
    if b'"ocr"' in (route.request.post_data_buffer or b""):
        route.continue_()
    else:
        route.abort()


def show_state(browser: Browser, url: str, scheme: Literal["light", "dark"]) -> None:
    """The upper half: is it working."""
    page = open_page(browser, url, scheme)
    save(page.screenshot(), f"state-{scheme}.png")
    page.close()


def show_text(browser: Browser, url: str, scheme: Literal["light", "dark"]) -> None:
    """The playground, with the lines of a picture that the project drew."""
    page = open_page(browser, url, scheme, width=760)
    drawn = FilePayload(name="drawn.jpg", mimeType="image/jpeg", buffer=draw_preview(1))
    page.set_input_files("#files", [drawn])
    found = page.locator("#text [data-count]")
    expect(found).to_have_attribute("data-count", "4", timeout=PATIENCE_MS)
    save(page.locator("#text").screenshot(), f"text-{scheme}.png")
    page.close()


def save(picture: bytes, name: str) -> None:
    """Write a small PNG; stop when it is not small."""
    with Image.open(io.BytesIO(picture)) as image:
        few = image.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    few.save(FOLDER / name, optimize=True)
    size = (FOLDER / name).stat().st_size
    print(f"{name}: {few.width}x{few.height}, {size / 1000:.0f} kB")
    if size > MAX_BYTES:
        sys.exit(f"{name} has {size} bytes, more than {MAX_BYTES}")


if __name__ == "__main__":
    main()
