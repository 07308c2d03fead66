"""Shared fixtures: one tiny bundle for the run, a folder of photos, and for the tests of the page a server and a browser of the run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from starlette.testclient import TestClient
from support.samples import noise_image
from support.server import READ_KEY, WRITE_KEY
from support.serving import serving
from support.tiny_bundle import build_tiny_bundle

from dqe_engine.engine import RetrievalEngine
from dqe_engine.server.app import create_app
from dqe_engine.server.keys import key_of
from dqe_engine.server.photos import Photos
from dqe_engine.server.settings import Key, ServerSettings
from dqe_engine.server.writes import Writes, make_index

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page


@pytest.fixture(scope="session")
def bundle_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture
def engine(bundle_path: Path) -> RetrievalEngine:
    """A fresh engine with an empty index, cheap for this bundle."""
    return RetrievalEngine.load(bundle_path, provider="cpu", threads=1)


COLOURS = ("red", "green", "blue")


@pytest.fixture(scope="session")
def shop(bundle_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `photos`, 24 of them in two folders, and `index`, of them, with metadata. Only read."""
    folder = tmp_path_factory.mktemp("shop")
    (folder / "photos" / "sub").mkdir(parents=True)
    ids = [f"{'sub/' if n % 2 else ''}{n:02}.png" for n in range(24)]
    for n, id in enumerate(ids):
        noise_image(n).save(folder / "photos" / id)
    with RetrievalEngine.load(bundle_path, provider="cpu", threads=1) as engine:
        metadata = {id: {"colour": COLOURS[n % 3], "price": n + 0.5, "sale": n < 6} for n, id in enumerate(ids)}
        engine.index_images(folder / "photos", metadata=metadata)
        engine.save_index(folder / "index")
    return folder


@pytest.fixture
def make_settings(bundle_path: Path, shop: Path, tmp_path: Path) -> Callable[..., ServerSettings]:
    """Settings of a server over a copy of the shop's index, as changed by `options`."""

    def make(**options: object) -> ServerSettings:
        index = tmp_path / "index"
        if not index.exists():
            shutil.copytree(shop / "index", index)
        given = {"bundle": bundle_path, "index": index, "photos": (("", shop / "photos"),), "provider": "cpu", "threads": 1, **options}
        return ServerSettings(**given)  # type: ignore[arg-type]

    return make


@pytest.fixture
def serve(make_settings: Callable[..., ServerSettings]) -> Iterator[Callable[..., TestClient]]:
    """Starts an application with settings so changed, and gives a client of it."""
    with ExitStack() as running:

        def start(**options: object) -> TestClient:
            app = create_app(make_settings(**options))
            return running.enter_context(TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False))

        yield start


@pytest.fixture
def keys() -> tuple[Key, ...]:
    """One that may read, READ_KEY, and one that may write, WRITE_KEY."""
    return (key_of(READ_KEY, "reader"), key_of(WRITE_KEY, "writer", may_write=True))


@pytest.fixture(scope="session")
def address(bundle_path: Path, shop: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of the page of a server over the shop, for tests that only read."""
    options = ["--images", str(shop / "photos"), "--provider", "cpu", "--threads", "1", "--log", "error"]
    with serving([str(bundle_path), str(shop / "index"), *options], tmp_path_factory.mktemp("page")) as server:
        yield f"{server.url}/"


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """How to connect to the browser of the run."""
    from support.page import browsing

    with browsing(tmp_path_factory.mktemp("chromium")) as endpoint:
        yield endpoint


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Browser]:
    """A connection to it. Of a module: as long as it is there, nothing else in this thread can run an event loop."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.connect_over_cdp(chromium)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens an address as a new visitor. What the page throws, and what its Content-Security-Policy refuses, fails the test."""
    from playwright.sync_api import expect
    from support.page import AT_REST, PATIENCE_MS

    wrong: list[str] = []
    with ExitStack() as contexts:

        def opened(address: str, *, at_rest: bool = True, prepare: Callable[[Page], Any] = lambda page: None, **options: Any) -> Page:
            context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
            contexts.callback(context.close)
            page = context.new_page()
            page.set_default_timeout(PATIENCE_MS)
            page.on("pageerror", lambda error: wrong.append(str(error)))
            page.on("console", lambda said: wrong.append(said.text) if "Content Security Policy" in said.text else None)
            prepare(page)
            page.goto(address)
            if at_rest:
                expect(page.locator(AT_REST)).to_be_attached()
                expect(page.locator(".skeleton")).to_have_count(0)
            return page

        yield opened
    assert not wrong


@pytest.fixture
def photo_folder(tmp_path: Path) -> Path:
    """Photos `b.png` and `a/b.png`, beside them links, a pipe, and a secret above them."""
    folder = tmp_path / "photos"
    (folder / "a").mkdir(parents=True)
    noise_image(1).save(folder / "b.png")
    noise_image(2).save(folder / "a" / "b.png")
    noise_image(3).save(tmp_path / "secret.png")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "linked").symlink_to(tmp_path)
    os.mkfifo(folder / "pipe.png")
    return folder


@pytest.fixture
def index_path(engine: RetrievalEngine, tmp_path: Path) -> Path:
    """An empty index of the bundle's shapes, saved."""
    assert make_index(engine.bundle, tmp_path / "index")
    return tmp_path / "index"


@pytest.fixture
def photos(tmp_path: Path) -> Photos:
    """No folder, and uploads in `tmp_path / "uploads"`."""
    return Photos([], tmp_path / "uploads")


@pytest.fixture
def writes(index_path: Path, engine: RetrievalEngine, photos: Photos) -> Iterator[Writes]:
    """Writes to `index_path` and uploads to `photos`."""
    made = Writes(index_path, engine, photos)
    yield made
    made.close()
