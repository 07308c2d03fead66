"""The pictures of the search page in README.md, of the page as it is: `python -m benchmarks.page_pictures`, over the sample that ships with
the package. Needs Chromium and Playwright (`pip install -e '.[dev]'`)."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode
from urllib.request import urlopen

from PIL import Image

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

DOCS = Path(__file__).parents[1] / "docs"
QUALITY = 88
PATIENCE_MS = 60_000
POLL_SECONDS = 0.2
AT_REST = "#results[aria-busy=false]"
REFERENCE = {"colour": "purple", "kind": "dress", "pattern": "striped"}
FIRST, SECOND = "is red and has dots", "is teal with stripes"
_SERVE = "import sys; from dqe_engine.cli.serve import main; sys.exit(main())"


@contextmanager
def serving_the_sample() -> Iterator[str]:
    """The address of the page, once every photo is indexed."""
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-c", _SERVE, "--sample", "--port", "0", "--log", "error"]
        environment = {**os.environ, "XDG_CACHE_HOME": cache}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as server:
            try:
                assert server.stdout is not None
                address = server.stdout.readline().split()[2]
                while (indexing := _read(f"{address}v1/status")["indexing"]) is None or indexing["state"] in ("comparing", "indexing"):
                    time.sleep(POLL_SECONDS)
                if indexing["state"] != "done":
                    raise SystemExit(f"error: the sample was not indexed: {indexing['message']}")
                yield address
            finally:
                server.terminate()


def _read(address: str) -> Any:
    with urlopen(address) as answer:
        return json.load(answer)


def pictures(browser: Browser, address: str, out: Path) -> None:
    """Write the three pictures to the folder `out`."""
    found = _read(f"{address}v1/items?{urlencode({'filter': json.dumps(REFERENCE), 'limit': 1})}")["items"]
    search = f"{address}?{urlencode({'ref': found[0]['id'], 'text': FIRST})}"

    page = _opened(browser, search, width=1280, height=800)
    page.locator("#grid > .tile .pick").nth(1).click()
    _settle(page)
    page.fill("#text", SECOND)
    with page.expect_response("**/v1/search"):
        page.press("#text", "Enter")
    slider = page.get_by_role("slider", name="colour")
    for _ in range(6):
        with page.expect_response("**/v1/search"):
            slider.press("ArrowRight")
    page.evaluate("document.activeElement.blur()")
    _save(page, out / "page-search.jpg")

    page = _opened(browser, search, width=1280, height=760, color_scheme="dark")
    page.locator("#grid > .tile .pick").first.focus()
    with page.expect_response("**/v1/search"):
        page.keyboard.press("x")
    _settle(page)
    page.locator("#grid > .tile .pick").first.focus()
    page.keyboard.press("i")
    page.locator("#details .alike .pick").first.wait_for()
    _save(page, out / "page-details.jpg")

    page = _opened(browser, search, width=390, height=844, color_scheme="dark", device_scale_factor=2, has_touch=True, is_mobile=True)
    page.get_by_role("button", name="Weights").click()
    _save(page, out / "page-phone.jpg")


def _opened(browser: Browser, address: str, *, width: int, height: int, **options: Any) -> Page:
    page = browser.new_context(viewport={"width": width, "height": height}, reduced_motion="reduce", **options).new_page()
    page.set_default_timeout(PATIENCE_MS)
    page.goto(address)
    _settle(page)
    return page


def _settle(page: Page) -> None:
    """Wait until the answer and its pictures are there."""
    page.locator(AT_REST).wait_for(state="attached")
    page.wait_for_load_state("networkidle")
    page.wait_for_function("document.querySelectorAll('.skeleton').length === 0")


def _save(page: Page, path: Path) -> None:
    _settle(page)
    Image.open(BytesIO(page.screenshot())).convert("RGB").save(path, quality=QUALITY, progressive=True, optimize=True)
    page.context.close()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="page_pictures", description=__doc__)
    parser.add_argument("--out", type=Path, default=DOCS, metavar="FOLDER", help="default: docs/")
    out = parser.parse_args(arguments).out
    chromium = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
    if chromium is None:
        parser.exit(2, "error: no Chromium on PATH; apt-get install chromium\n")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        parser.exit(2, "error: no playwright; pip install -e '.[dev]'\n")
    with serving_the_sample() as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium)
        pictures(browser, address, out)
        browser.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
