"""Shared fixtures: one tiny bundle for the run, and small noisy images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.answers import Answers
from support.samples import image_rows, noise_image, target_rows
from support.tiny_bundle import build_tiny_bundle

from dqe_engine.batching import Batcher
from dqe_engine.cli import index as index_command
from dqe_engine.engine import RetrievalEngine
from dqe_engine.index import GalleryIndex

if TYPE_CHECKING:
    from support.fake_tensorrt import FakeTensorRT


@pytest.fixture(scope="session")
def bundle_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture
def engine(bundle_path: Path) -> RetrievalEngine:
    """A fresh engine with an empty index, cheap for this bundle."""
    return RetrievalEngine.load(bundle_path, provider="cpu", threads=1)


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Twelve images, half of them in a subfolder, and two files that are no images by name."""
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    for seed in range(12):
        noise_image(seed).save(folder / ("sub" if seed % 2 else "") / f"{seed:02}.png")
    (folder / "notes.txt").write_text("not an image")
    (folder / ".DS_Store").write_bytes(b"\0")
    return folder


@pytest.fixture
def make_index() -> Callable[..., GalleryIndex]:
    """Indexes of M = 2, D = 4, P = 3, Hv = 5; `rows` seeded items named i0, i1, …"""

    def make(rows: int = 0, **options: object) -> GalleryIndex:
        index = GalleryIndex(model_hash="m" * 32, target_shape=(2, 4), image_shape=(3, 5), **options)
        if rows:
            images = image_rows(rows) if index.image_storage != "none" else None
            index.add([f"i{n}" for n in range(rows)], target_rows(rows), images)
        return index

    return make


@pytest.fixture
def indexed(bundle_path: Path, image_folder: Path, tmp_path: Path) -> list[str]:
    """An index by dqe-index of the image folder: the first two arguments of dqe-search."""
    arguments = [str(bundle_path), str(tmp_path / "index")]
    assert index_command.main([arguments[0], str(image_folder), "--out", arguments[1], "--provider", "cpu", "--threads", "1"]) == 0
    return arguments


@pytest.fixture
def answers() -> Answers:
    """What `batcher` asks."""
    return Answers()


@pytest.fixture
def batcher(answers: Answers) -> Iterator[Batcher[int, int]]:
    """Batches of four, and room for six questions that wait."""
    with Batcher(answers, most=4, room=6) as made:
        yield made
        answers.gate.set()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(32) as made:
        yield made


@pytest.fixture
def with_engines(trt: FakeTensorRT, bundle_path: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes TensorRT engines into a copy of the bundle, whose path it gives."""
    from support.tiny_engines import engine_writer

    return engine_writer(trt, bundle_path, tmp_path / "bundle")
