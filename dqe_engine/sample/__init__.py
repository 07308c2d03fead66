"""The sample: a small trained bundle and the photos of a made-up shop, to look at the engine without training (README.md beside this)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from dqe_engine.errors import IndexConflictError, InputError
from dqe_engine.files import cache_home

if TYPE_CHECKING:
    from dqe_engine.engine import RetrievalEngine

METADATA_FILE = "metadata.jsonl"


def bundle() -> Path:
    """Folder of the bundle. Raises InputError for an installation that lacks it."""
    return _part("bundle")


def photos() -> Path:
    """Folder of the photos, whose ids are their names in it. Raises InputError as `bundle` does."""
    return _part("photos")


def metadata() -> Path:
    """JSON lines with each photo's `id`, colour, kind, pattern, length and made-up price. Raises InputError as `bundle` does."""
    return _part("photos/" + METADATA_FILE)


def _part(name: str) -> Path:
    path = Path(__file__).parent / name
    if not path.exists():
        raise InputError(f"{path}: not there; this installation lacks the sample, install the package again")
    return path


def index() -> Path:
    """Where the sample's index is kept: `XDG_CACHE_HOME` (else ~/.cache) /dqe-engine/sample/HASH, by the content of bundle and photos. It
    need not be there. Raises InputError for a user without a home directory."""
    digest = hashlib.blake2b((bundle() / "manifest.json").read_bytes(), digest_size=8)  # it has the hashes of the graphs
    for file in sorted(photos().iterdir()):
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        digest.update(file.read_bytes())
    try:
        home = cache_home()
    except RuntimeError as error:
        raise InputError(
            "no place for the sample's index: this user has no home directory; name a folder, or set XDG_CACHE_HOME"
        ) from error
    return home / "dqe-engine" / "sample" / digest.hexdigest()


def prepare_index(
    engine: RetrievalEngine, folder: str | os.PathLike[str] | None = None, *, progress: Callable[[int, int], None] | None = None
) -> Path:
    """Attach the sample's index to `engine`, which has the sample's bundle, and return its folder; made first where there is none.

    folder: of the index; `index()` if None. An index that is there is taken as it is, whatever was added to it since. progress:
    called with (images done, images in all) while it is made. Where two processes make it, the first to finish counts.
    Raises InputError, and IndexFormatError for an index of another model or a folder that cannot be written.
    """
    from dqe_engine.index.metadata_file import read_metadata

    place = index() if folder is None else Path(folder)
    if not (place / "manifest.json").exists():
        engine.new_index()
        engine.index_images(photos(), metadata=read_metadata(metadata()), progress=progress)
        try:
            engine.save_index(place)
        except IndexConflictError:
            if not (place / "manifest.json").exists():
                raise
    engine.load_index(place)
    return place
