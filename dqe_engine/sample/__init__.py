"""The sample: a small trained bundle and the photos of a made-up shop, to look at the engine without training (README.md beside this)."""

from __future__ import annotations

import hashlib
from pathlib import Path

from dqe_engine.errors import InputError
from dqe_engine.files import cache_home

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
    """Where `dqe-serve --sample` keeps its index: `XDG_CACHE_HOME` (else ~/.cache) /dqe-engine/sample/HASH, by bundle and photos. It
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
