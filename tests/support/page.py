"""What tests of the page share: a server and a browser of the whole run, servers of a test's own, and what is read off the page.

Importing this skips the module that does, and says what to install, where there is no browser or no driver of one; so what tests need of
the driver is imported from here.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("playwright", reason="no playwright: pip install -e '.[dev]'")
pytest.importorskip("axe_playwright_python", reason="no axe-playwright-python: pip install -e '.[dev]'")

import uvicorn
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Locator, Page, Request, Route, expect

from dqe_engine.server.app import create_app
from dqe_engine.server.settings import ServerSettings

__all__ = [
    "AT_REST", "ITEM", "LONG", "PATIENCE_MS", "PICKS", "SLIDER", "Axe", "MakeSettings", "OpenPage", "Page", "Recorded", "Route", "asked",
    "browsing", "expect", "paged", "problem", "running", "search", "serving", "shown", "tile",
]  # fmt: skip
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
_FOUND = next((found for name in BROWSERS if (found := shutil.which(name))), None)
if _FOUND is None:
    pytest.skip(f"no {', '.join(BROWSERS)} on PATH: apt-get install chromium", allow_module_level=True)
CHROMIUM: str = _FOUND

OpenPage = Callable[..., Page]
MakeSettings = Callable[..., ServerSettings]
PATIENCE_MS = 60_000
"""For what is waited for: a busy machine is slow, and no test measures time."""
ITEM = "sub/01.png"
PICKS = "#grid > .tile .pick"
SLIDER = "#sliders input"
AT_REST = "#results[aria-busy=false]"
LONG = "the same but red with long sleeves and " * 40
_ARGUMENTS = (
    "--headless", "--no-sandbox", "--remote-debugging-port=0", "--no-first-run", "--mute-audio", "--hide-scrollbars",
    "--disable-background-networking", "--disable-background-timer-throttling", "--disable-backgrounding-occluded-windows",
    "--disable-renderer-backgrounding", "--disable-dev-shm-usage", "--disable-extensions", "--disable-gpu",
    "--blink-settings=primaryHoverType=2,availableHoverTypes=2,primaryPointerType=4,availablePointerTypes=4",  # a mouse
)  # fmt: skip
expect.set_options(timeout=PATIENCE_MS)


# ---- servers and the browser -----------------------------------------------------------------------------------------------------------


@contextmanager
def browsing(folder: Path) -> Iterator[str]:
    """The address by which drivers connect to a Chromium that runs in a process of its own, with its profile in `folder`."""
    told = folder / "DevToolsActivePort"
    command = [CHROMIUM, *_ARGUMENTS, f"--user-data-dir={folder}", "about:blank"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as browser:
        try:
            while not (told.exists() and told.read_text().count("\n")):
                assert browser.poll() is None, f"{CHROMIUM} ended with {browser.returncode}"
                time.sleep(0.02)
            yield f"http://127.0.0.1:{told.read_text().split()[0]}"
        finally:
            browser.terminate()


class UnderPrefix:
    """What a gateway does that serves the application under a path: it takes the path off."""

    def __init__(self, app: Any, prefix: str) -> None:
        self._app, self._prefix = app, prefix

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            assert scope["path"].startswith(f"{self._prefix}/"), scope["path"]
            cut = len(self._prefix)
            scope = {**scope, "path": scope["path"][cut:], "raw_path": scope["raw_path"][cut:]}
        await self._app(scope, receive, send)


class Recorded:
    """Keeps the body of each request that is sent to `path`: browsers do not tell what was in a form with files."""

    def __init__(self, app: Any, path: str) -> None:
        self._app, self._path = app, path
        self.bodies: list[bytes] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        parts: list[bytes] = []
        whole = False

        async def recording() -> Any:
            nonlocal whole
            message = await receive()
            if message["type"] == "http.request" and not whole:
                parts.append(message.get("body", b""))
                if whole := not message.get("more_body"):
                    self.bodies.append(b"".join(parts))
            return message

        await self._app(scope, recording if scope.get("path") == self._path else receive, send)


@contextmanager
def running(settings: ServerSettings, *, prefix: str = "") -> Iterator[str]:
    """The address of the page while the server runs, in a thread of this process."""
    app: Any = create_app(settings)
    with serving(UnderPrefix(app, prefix) if prefix else app) as root:
        yield f"{root}{prefix}/"


@contextmanager
def serving(app: Any) -> Iterator[str]:
    """The address, without a slash, of any ASGI application while it runs."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, lifespan="on", log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


# ---- what is done and read -------------------------------------------------------------------------------------------------------------


def shown(page: Page) -> list[str]:
    """The ids in the grid, in their order."""
    found: list[str] = page.locator("#grid > .tile").evaluate_all("tiles => tiles.map(tile => tile.dataset.id)")
    return found


def tile(page: Page, id: str) -> Locator:
    return page.locator(f'#grid > .tile[data-id="{id}"]')


def search(page: Page, text: str) -> None:
    """Search for a text, and wait for what comes of it."""
    page.fill("#text", text)
    with page.expect_response("**/v1/search"):
        page.press("#text", "Enter")
    expect(page.locator(AT_REST)).to_be_attached()


def asked(request: Request) -> dict[str, Any]:
    """The query of a search without an upload."""
    return dict(json.loads(request.post_data or "{}"))


def problem(status: int, code: str, message: str, **headers: str) -> Callable[[Route], None]:
    """Answers a route with an error of the API."""
    error = {"error": {"code": code, "message": message, "request_id": "0123abcd"}}
    return lambda route: route.fulfill(status=status, json=error, headers=headers)


def paged(query: dict[str, Any]) -> dict[str, Any]:
    """A made-up answer: a page of sixty hits."""
    hits = [
        {"id": f"item {n}", "score": 1 - n / 100, "delta": n / 100, "metadata": None, "zone": None, "explanation": None}
        for n in range(query["offset"], min(60, query["offset"] + query["k"]))
    ]
    return {"hits": hits, "mode": "text", "weights": {}, "predicted_weights": {}, "overrides": {}, "truncated": False,
            "unknown_words": [], "zones": None, "timings_ms": {}, "index": {"items": 60, "revision": "x"}}  # fmt: skip
