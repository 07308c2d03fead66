"""Images of a folder by id: the file name without its suffix, wherever the file lies under the folder."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dqe_engine.errors import InputError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})


@dataclass(frozen=True)
class ImageFolder:
    """`names`: id to path relative to `root`, as POSIX text."""

    root: Path
    names: Mapping[str, str]

    @classmethod
    def scan(cls, root: Path) -> ImageFolder:
        """Walk the folder once, nested folders and links to folders too; hidden files are left out.

        Raises InputError where it cannot be listed, and where two files have the same id, naming both.
        """
        if not root.is_dir():
            raise InputError(f"{root}: no such image folder")
        names: dict[str, str] = {}
        for path in _image_files(root):
            name, id = path.relative_to(root).as_posix(), path.stem
            if id in names:
                raise InputError(f"{root}: two images have the id {id!r}: {names[id]} and {name}; keep one of them")
            names[id] = name
        return cls(root, names)

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, id: object) -> bool:
        return id in self.names

    def missing(self, ids: Iterable[str]) -> tuple[str, ...]:
        """The ids that have no file, each once, in the order given."""
        return tuple(id for id in dict.fromkeys(ids) if id not in self.names)


def _image_files(root: Path) -> list[Path]:
    found: list[Path] = []
    seen: set[str] = set()  # folders by their real path: links may lead in circles
    for directory, folders, files in os.walk(root, followlinks=True, onerror=_unreadable):
        real = os.path.realpath(directory)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        found += [Path(directory, name) for name in files if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES]
    return sorted(found)


def _unreadable(error: OSError) -> None:
    raise InputError(f"{error.filename}: cannot be listed ({error.strerror})") from error
