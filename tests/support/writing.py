"""What tests of `Writes` ask: small images, what is saved and uploaded, and an index that another process holds."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from support.hostile_images import encoded
from support.samples import noise_image

from dqe_engine.files import directory_lock
from dqe_engine.index import GalleryIndex
from dqe_engine.server.uploads import MARKER


def png(seed: int) -> bytes:
    return encoded(noise_image(seed), "PNG")


def there(path: Path) -> dict[str, tuple[Any, str | None]]:
    """Metadata and content by id, of all that is saved; everything is read and held against its checksums."""
    with GalleryIndex.load(path, verify=True) as index:
        return {item.id: (item.metadata, item.content) for item in index}


def uploads(tmp_path: Path) -> set[str]:
    return {file.parent.name + file.name for file in (tmp_path / "uploads").rglob("*") if file.is_file() and file.name != MARKER}


def revision(path: Path) -> str | None:
    return GalleryIndex.load(path).stats().revision


def hold_index(path: Path) -> tuple[threading.Event, threading.Thread]:
    """Hold the index's lock until the event is set."""
    held, let_go = threading.Event(), threading.Event()

    def work() -> None:
        with directory_lock(path):
            held.set()
            let_go.wait(60)

    thread = threading.Thread(target=work)
    thread.start()
    assert held.wait(60)
    return let_go, thread
