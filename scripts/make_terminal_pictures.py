"""Photographs what commands print, for the docs: real runs, in the scene of `docs_scene.py`.

Run by `make pictures`. Needs Chromium from the system's packages, and what the scene needs. All
photos are drawn by the project.
"""

import io
import subprocess

import docs_scene
from make_pictures import find_browser, save
from playwright.sync_api import Browser, sync_playwright
from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

from immich_ml_metal.drawing import draw_preview

COLUMNS = 112
# Name of the picture, and what is typed.
SHOWN = {
    "demo": "immich-ml-metal demo",
    "doctor": "immich-ml-metal doctor",
    "qualify": "immich-ml-metal qualify buffalo_s --engine mlx",
}
COMPARED = "immich-ml-metal parity drawn --against http://docker-host:3005 --html report.html"
PHOTOS = 6
PAGE = """<!doctype html><meta charset="utf-8"><style>
body {{ margin: 0; background: #fff }}
pre {{ margin: 0; padding: 14px 18px; display: inline-block; background: #17181c;
  color: #d9d9d9; font: 13px/1.4 "DejaVu Sans Mono", monospace }}
{stylesheet}</style><pre>{code}</pre>"""


def main() -> None:
    """Write docs/pictures/{demo,doctor,qualify,parity}.png."""
    scratch = docs_scene.enter()
    with docs_scene.scene(scratch, docs_scene.make_models(scratch / "models")):
        shown = {"demo": print_of(SHOWN["demo"])}  # as after a new installation
        docs_scene.show_models(wanted=True)
        shown["qualify"] = print_of(SHOWN["qualify"])
        print_of("immich-ml-metal service install")
        docs_scene.wait_for("http://127.0.0.1:3003/ping")
        shown["doctor"] = print_of(SHOWN["doctor"])
        report = compare()
        with sync_playwright() as playwright:
            browser = find_browser(playwright)
            for name, printed in shown.items():
                photograph(browser, html_of(printed, SHOWN[name]), "pre", f"{name}.png")
            photograph(browser, report, "body", "parity.png", height=760)
            browser.close()


def print_of(command: str) -> str:
    """What a command prints on a terminal of this width, with its colours."""
    variables = docs_scene.VARIABLES | {"COLUMNS": str(COLUMNS), "FORCE_COLOR": "1"}
    done = subprocess.run(
        command.split(),
        cwd=docs_scene.CHECKOUT,
        env=variables | {"TERM": "xterm-256color"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # where progress goes
        text=True,
        check=False,
    )
    return done.stdout


def compare() -> str:
    """`parity`'s report on drawn pictures, against a service that squashes them."""
    folder = docs_scene.CHECKOUT / "drawn"
    folder.mkdir()
    for seed in range(1, PHOTOS + 1):
        (folder / f"drawn-{seed}.jpg").write_bytes(draw_preview(seed))
    print_of(COMPARED)
    return (docs_scene.CHECKOUT / "report.html").read_text(encoding="utf-8")


def html_of(printed: str, command: str) -> str:
    """A page that looks like a terminal."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO())
    typed = Text(f"$ {command}\n", style="bold")
    console.print(Text.assemble(typed, Text.from_ansi(printed.strip("\n"))))
    return console.export_html(theme=MONOKAI, code_format=PAGE)


def photograph(
    browser: Browser, html: str, selector: str, name: str, height: int | None = None
) -> None:
    """Save one element of a page, or the upper part of it."""
    page = browser.new_page(viewport={"width": 1000, "height": height or 760})
    page.set_content(html)
    picture = page.screenshot() if height else page.locator(selector).screenshot()
    save(picture, name)
    page.close()


if __name__ == "__main__":
    main()
