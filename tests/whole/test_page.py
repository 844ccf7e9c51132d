"""The page in a real browser: Debian's Chromium, driven by Playwright."""

import asyncio
import base64
import contextlib
import io
import json
import re
import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Literal

import pytest
from doubles.gateway import free_port, gateway_process, running_gateway
from doubles.tiny_models import CLIP, FACES, OCR, draw_faces, draw_text
from PIL import Image
from playwright.async_api import Browser, FilePayload, Page, Route, async_playwright, expect

from immich_ml_metal.client.own_service import running_service

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(180)]

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
PATIENCE_MS = 20_000
OCR_REQUEST = b'{"ocr":{"detection":{"modelName":"m"}}}'

expect.set_options(timeout=PATIENCE_MS)


@pytest.fixture(scope="module")
async def chromium() -> AsyncIterator[Browser]:
    """Debian's Chromium: the browser comes from the distribution, never from a download."""
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        await browser.close()


@contextlib.asynccontextmanager
async def page_of(chromium: Browser, url: str, *, width: int = 1200) -> AsyncIterator[Page]:
    """The page at `url`; afterwards it has said nothing on the console and asked nobody else."""
    page = await chromium.new_page(viewport={"width": width, "height": 900}, locale="en-GB")
    complaints: list[str] = []
    home = "/".join(url.split("/")[:3]) + "/"
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda told: complaints.append(told.text))
    page.on(
        "request",
        lambda asked: (
            None if asked.url.startswith((home, "blob:")) else complaints.append(asked.url)
        ),
    )
    await page.goto(url)
    await expect(page.locator("#state-word")).not_to_have_text("Asking the service …")
    try:
        yield page
    finally:
        await page.close()
    refused = "Failed to load resource"  # what Chromium says of a service that is away
    assert [words for words in complaints if refused not in words] == []


async def test_first_steps_are_ticked_off_when_requests_come(
    chromium: Browser, tmp_path: Path
) -> None:
    async with (
        running_gateway(tmp_path) as service,
        page_of(chromium, f"http://127.0.0.1:{service.port}/") as page,
    ):
        assert page.url.endswith("/ui/")
        await expect(page.locator("#state-word")).to_have_text("Ready")
        await expect(page.locator("#addresses")).to_have_text(f"http://127.0.0.1:{service.port}")
        await expect(page.locator('[data-step="asked"]')).not_to_have_class("done")
        await service.predict(OCR_REQUEST)
        await expect(page.locator("#state-word")).to_have_text("Working")
        await expect(page.locator("#first")).to_be_hidden()
        await expect(page.locator('tr[data-kind="ocr"] [data-cell="done"]')).to_have_text("1")


async def test_a_crash_shows_with_its_cause(chromium: Browser, tmp_path: Path) -> None:
    async with (
        running_gateway(tmp_path) as service,
        page_of(chromium, f"http://127.0.0.1:{service.port}/ui/") as page,
    ):
        await expect(page.locator("#failures")).to_contain_text("Nothing since the start.")
        await service.predict(b"[abort]" + OCR_REQUEST)
        await expect(page.locator("#failures")).to_contain_text("SIGABRT")
        await expect(page.locator("#worker")).to_contain_text("crash 2")
        await expect(page.locator('tr[data-kind="ocr"] [data-cell="failed"]')).to_have_text("1")


async def test_a_worker_that_only_dies_is_shown_as_such(chromium: Browser, tmp_path: Path) -> None:
    (tmp_path / "refuse").touch()
    async with (
        running_gateway(tmp_path) as service,
        page_of(chromium, f"http://127.0.0.1:{service.port}/ui/") as page,
    ):
        words = re.compile("Trying again after a crash|The worker does not start")
        await expect(page.locator("#state-word")).to_have_text(words)
        level = await page.locator("#state").get_attribute("data-level")
        assert level in {"warn", "bad"}


async def test_a_restart_of_the_service_is_survived(chromium: Browser, tmp_path: Path) -> None:
    port = free_port()
    async with contextlib.AsyncExitStack() as stack:
        async with gateway_process(tmp_path, port=port):
            page = await stack.enter_async_context(
                page_of(chromium, f"http://127.0.0.1:{port}/ui/")
            )
            await expect(page.locator("#state-word")).to_have_text("Ready")
        await expect(page.locator("#state-word")).to_have_text("No connection")
        await expect(page.locator("#stale")).to_contain_text("has not answered for")
        async with gateway_process(tmp_path, port=port):
            await expect(page.locator("#state-word")).to_have_text("Ready")
            await expect(page.locator("#stale")).to_be_hidden()


async def test_names_are_text_and_never_html(chromium: Browser, tmp_path: Path) -> None:
    name = "<script>document.title=1</script><img src=x onerror=alert(1)>"
    model = {"model": name, "part": "visual", "engine": "cpu", "size_bytes": 5_000_000}
    download = {"model": name, "phase": name, "done_bytes": 1, "total_bytes": 2}
    download |= {"rate_bytes_s": 3, "remaining_s": 4.0, "note": name}
    told = {"models": [model], "downloads": [download], "engines": {"clip/visual": name}}
    (tmp_path / "health.json").write_text(json.dumps(told))
    async with (
        running_gateway(tmp_path) as service,
        page_of(chromium, f"http://127.0.0.1:{service.port}/ui/") as page,
    ):
        await expect(page.locator("#models li")).to_have_text(f"{name} visual · cpu · 5 MB")
        await expect(page.locator("#models label")).to_contain_text(name)
        assert await page.locator("main script, main img[src=x]").count() == 0


async def test_verdicts_warnings_and_a_changed_index_are_shown(
    chromium: Browser, tmp_path: Path
) -> None:
    slot = {"model": "buffalo_l", "engine": "mlx", "number_format": "float16", "reason": "right"}
    plan = {
        "tasks": {
            "facial-recognition/detection": slot,
            "ocr/detection": {**slot, "model": "m", "engine": "cpu", "number_format": "float32"},
        },
        "pending": ["ocr/detection/m"],
        "warnings": ["coreml was set aside"],
    }
    index = [
        {"model": "a", "state": "changed", "served": "as before", "text": "run Smart Search"},
        {"model": "b", "state": "same", "served": "as set", "text": "all is well"},
    ]
    (tmp_path / "health.json").write_text(json.dumps({"engine_plan": plan, "index": index}))
    async with (
        running_gateway(tmp_path) as service,
        page_of(chromium, f"http://127.0.0.1:{service.port}/ui/") as page,
    ):
        await expect(page.locator('tr[data-kind="faces"]')).to_contain_text("mlx float16right")
        await expect(page.locator('tr[data-kind="ocr"]')).to_contain_text("to be checked")
        await expect(page.locator("#problems li")).to_have_text(
            ["run Smart Search", "coreml was set aside"]
        )


async def test_a_task_that_fails_is_shown_with_what_to_do(
    chromium: Browser, tmp_path: Path
) -> None:
    async with (
        running_gateway(tmp_path) as service,
        page_of(chromium, f"http://127.0.0.1:{service.port}/ui/") as page,
    ):
        await service.predict(OCR_REQUEST + b"[status 500]")
        await expect(page.locator("#problems li")).to_contain_text("ocr with m: answered 500")
        await expect(page.locator("#state-word")).to_have_text("Working, with trouble")
        await expect(page.locator("#state")).to_have_attribute("data-level", "warn")
        await service.predict(b"[abort]" + OCR_REQUEST)
        await expect(page.locator("#failures .quiet").first).to_contain_text("doctor --share")
        await service.predict(OCR_REQUEST)
        await expect(page.locator("#problems")).to_be_hidden()


async def test_immichs_queues_are_shown_with_what_is_paused(
    chromium: Browser, tmp_path: Path
) -> None:
    queue = {"active": 2, "waiting": 1198, "failed": 0, "is_paused": False}
    told: dict[str, object] = {
        "queues": {"ocr": queue, "faceDetection": {**queue, "is_paused": True}}
    }
    told["paused"] = {"faceDetection": {"reason": "no model", "since": "2026-01-02T03:04:05+00:00"}}

    async def with_queues(route: Route) -> None:
        answer = await route.fetch()
        await route.fulfill(json={**await answer.json(), "guard": {"state": "on", **told}})

    async with running_gateway(tmp_path) as service:
        page = await chromium.new_page(locale="en-GB")
        await page.route("**/health", with_queues)
        await page.goto(f"http://127.0.0.1:{service.port}/ui/")
        await expect(page.locator('tr[data-kind="ocr"] [data-cell="waiting"]')).to_have_text(
            "1,200"
        )
        paused = page.locator('tr[data-kind="faces"] [data-cell="waiting"]')
        await expect(paused).to_have_text("1,200, paused")
        await expect(page.locator("#guard li")).to_contain_text("faceDetection is paused")
        await page.close()


async def test_the_policy_stops_a_script_that_got_in(chromium: Browser, tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as service:
        page = await chromium.new_page()
        await page.goto(f"http://127.0.0.1:{service.port}/ui/")
        await page.evaluate(
            "() => { const s = document.createElement('script'); s.textContent = 'window.got = 1';"
            " document.body.append(s); document.body.insertAdjacentHTML('beforeend',"
            " '<img src=x onerror=\"window.got=1\">'); }"
        )
        await asyncio.sleep(0.2)
        assert await page.evaluate("window.got") is None


async def test_the_page_fits_a_phone_and_obeys_the_keyboard(
    chromium: Browser, tmp_path: Path
) -> None:
    async with (
        running_gateway(tmp_path) as service,
        page_of(chromium, f"http://127.0.0.1:{service.port}/ui/", width=360) as page,
    ):
        # armed long before the key: Playwright does not wait until the browser intercepts choosers
        chosen = asyncio.Event()
        page.on("filechooser", lambda chooser: chosen.set())
        await expect(page.locator("#tiles b").first).to_be_visible()
        overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert await page.evaluate(overflow) == 0
        await page.keyboard.press("Tab")
        assert await page.evaluate("document.activeElement.className") == "skip"
        await page.locator("#drop").focus()
        await expect(page.locator("#drop")).to_be_focused()
        await page.keyboard.press("Enter")
        await asyncio.wait_for(chosen.wait(), 30)


async def test_searches_that_only_fail_are_not_called_working(
    chromium: Browser, tmp_path: Path
) -> None:
    search = b'{"clip":{"textual":{"modelName":"m"}}}'
    async with (
        running_gateway(tmp_path) as service,
        page_of(chromium, f"http://127.0.0.1:{service.port}/ui/") as page,
    ):
        await service.predict(search + b"[status 500]")
        await expect(page.locator("#state-word")).to_have_text("Working, with trouble")
        await service.predict(search)
        await expect(page.locator("#state-word")).to_have_text("Working")


async def test_an_answer_that_the_page_does_not_understand_does_not_stop_it(
    chromium: Browser, tmp_path: Path
) -> None:
    async with (
        running_gateway(tmp_path) as service,
        page_of(chromium, f"http://127.0.0.1:{service.port}/ui/") as page,
    ):
        await page.route("**/health", lambda route: route.fulfill(json={"status": "ok"}))
        await expect(page.locator("#stale")).to_contain_text("has not answered for")
        await page.unroute("**/health")
        await expect(page.locator("#stale")).to_be_hidden()


# -- the playground, on small models that really answer ------------------------------------------


@pytest.fixture(scope="module")
def url(models: Path) -> Iterator[str]:
    options = {"--models-dir": str(models), "--log-level": "warning"}
    with running_service(options) as child:
        yield child.url


async def drop(page: Page, name: str, content: bytes, kind: str = "image/png") -> None:
    file = FilePayload(name=name, mimeType=kind, buffer=content)
    await page.set_input_files("#files", [file])


async def choose(page: Page, choice: str, model: str) -> None:
    await page.select_option(f'[data-choice="{choice}"]', model)


# Of the faces' boxes, in the picture's pixels, from left to right.
CENTRES = """() => {
  const image = document.querySelector("#faces .canvas img");
  const picture = image.getBoundingClientRect();
  return [...document.querySelectorAll("#faces rect.face")]
    .map((face) => face.getBoundingClientRect())
    .map((box) => [
      ((box.x + box.width / 2 - picture.x) * image.naturalWidth) / picture.width,
      ((box.y + box.height / 2 - picture.y) * image.naturalHeight) / picture.height,
    ])
    .sort((one, other) => one[0] - other[0]);
}"""


async def test_a_face_is_drawn_where_it_is(chromium: Browser, url: str) -> None:
    async with page_of(chromium, f"{url}/ui/") as page:
        await drop(page, "faces.png", draw_faces((208, 160), (448, 304)))
        await choose(page, "facial-recognition-model", FACES)
        await expect(page.locator("#faces [data-count]")).to_have_attribute("data-count", "2")
        centres = await page.evaluate(CENTRES)  # at one moment: answers of other tasks move them
        assert centres[0] == pytest.approx((208, 160), abs=12)
        assert centres[1] == pytest.approx((448, 304), abs=12)
        await expect(page.locator("#faces [data-timing]")).to_contain_text("answered in")


async def test_a_slider_hides_a_line_and_shows_it_again(chromium: Browser, url: str) -> None:
    async with page_of(chromium, f"{url}/ui/") as page:
        await drop(page, "text.png", draw_text("abba", "cab"))
        await choose(page, "ocr-model", OCR)
        slider, found = page.locator("#box-score"), page.locator("#text [data-count]")
        await slider.fill("0.1")
        await page.locator("#line-score").fill("0.1")
        await expect(found).not_to_have_attribute("data-count", "0")
        seen = await found.get_attribute("data-count")
        await expect(page.locator("#text polygon")).to_have_count(int(seen or 0))
        await slider.fill("1")
        await expect(found).to_have_attribute("data-count", "0")
        await slider.fill("0.1")
        await expect(found).to_have_attribute("data-count", str(seen))


async def test_pictures_and_texts_are_compared_in_a_table(chromium: Browser, url: str) -> None:
    async with page_of(chromium, f"{url}/ui/") as page:
        for name in ("one.png", "two.png"):
            await drop(page, name, draw_text("abc"))
        await choose(page, "clip-model", CLIP)
        table = page.locator("#search table")
        await expect(table.locator("tbody tr")).to_have_count(2)
        await expect(table.locator("tbody tr").first.locator("td")).to_have_count(4)
        value = await table.locator("td").first.text_content()
        assert -1 <= float(value or "x") <= 1
        await expect(table.locator("td.best")).not_to_have_count(0)


async def test_two_models_are_shown_side_by_side(chromium: Browser, url: str) -> None:
    async with page_of(chromium, f"{url}/ui/") as page:
        await drop(page, "faces.png", draw_faces((208, 160)))
        await choose(page, "facial-recognition-model", FACES)
        await choose(page, "facial-recognition-second", "buffalo_l")
        await expect(page.locator("#faces [data-model]")).to_have_count(2)
        await expect(page.locator("#faces")).to_contain_text(f"{FACES}: 1 face")


@pytest.mark.parametrize(
    ("name", "kind", "content"),
    [("notes.txt", "text/plain", b"hello"), ("broken.png", "image/png", b"not a picture")],
)
async def test_what_is_no_picture_is_told_so(
    chromium: Browser, url: str, name: str, kind: str, content: bytes
) -> None:
    async with page_of(chromium, f"{url}/ui/") as page:
        await drop(page, name, content, kind)
        await expect(page.locator("#try-error")).to_contain_text(f"{name} is not a picture")
        assert await page.locator("#pictures button").count() == 0


async def test_a_refusal_of_the_service_is_shown_in_its_words(chromium: Browser, url: str) -> None:
    async with page_of(chromium, f"{url}/ui/") as page:
        await page.route(
            "**/predict",
            lambda route: route.fulfill(status=422, json={"detail": "model <b>x</b> is unknown"}),
        )
        await drop(page, "text.png", draw_text("a"))
        await expect(page.locator("#faces .error")).to_have_text(
            "The service answered 422: model <b>x</b> is unknown"
        )


async def test_a_picture_that_lies_on_its_side_is_turned_as_the_browser_shows_it(
    chromium: Browser, url: str
) -> None:
    image = Image.open(io.BytesIO(draw_faces((208, 160), size=(640, 480))))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by a quarter, clockwise: 480 wide
    turned = io.BytesIO()
    image.transpose(Image.Transpose.ROTATE_90).save(turned, "JPEG", quality=95, exif=exif)
    async with page_of(chromium, f"{url}/ui/") as page:
        await drop(page, "phone.jpg", turned.getvalue(), "image/jpeg")
        await choose(page, "facial-recognition-model", FACES)
        await expect(page.locator("#faces [data-count]")).to_have_attribute("data-count", "1")
        await expect(page.locator("#faces .canvas svg")).to_have_attribute("viewBox", "0 0 640 480")
        box = page.locator("#faces rect.face")
        left, width = [float(await box.get_attribute(name) or 0) for name in ("x", "width")]
        assert left + width / 2 == pytest.approx(208, abs=12)


PASTE_AND_DROP = """async (png) => {
  const bytes = Uint8Array.from(atob(png), (letter) => letter.charCodeAt(0));
  const files = new DataTransfer();
  files.items.add(new File([bytes], "p.png", { type: "image/png" }));
  document.dispatchEvent(new ClipboardEvent("paste", { clipboardData: files, bubbles: true }));
  const how = { dataTransfer: files, bubbles: true, cancelable: true };
  document.dispatchEvent(new DragEvent("drop", how));
}"""


async def test_pictures_can_be_pasted_and_dropped(chromium: Browser, url: str) -> None:
    async with page_of(chromium, f"{url}/ui/") as page:
        await page.evaluate(PASTE_AND_DROP, base64.b64encode(draw_text("a")).decode())
        await expect(page.locator("#pictures button")).to_have_count(2)


async def test_the_page_is_dark_where_the_system_is(chromium: Browser, url: str) -> None:
    grounds = []
    schemes: tuple[Literal["light", "dark"], ...] = ("light", "dark")
    for scheme in schemes:
        page = await chromium.new_page(color_scheme=scheme)
        await page.goto(f"{url}/ui/")
        grounds.append(await page.evaluate("getComputedStyle(document.body).backgroundColor"))
        await page.close()
    assert grounds == ["rgb(246, 247, 249)", "rgb(18, 21, 27)"]
