"""Shared fixtures: one tiny bundle for the run, and a folder of photos."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from starlette.testclient import TestClient
from support.samples import noise_image
from support.server import READ_KEY, WRITE_KEY
from support.tiny_bundle import build_tiny_bundle

from dqe_engine.engine import RetrievalEngine
from dqe_engine.server.app import create_app
from dqe_engine.server.keys import key_of
from dqe_engine.server.settings import Key, ServerSettings


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
