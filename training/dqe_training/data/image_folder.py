"""Images of a folder by id: the file name without its suffix, wherever the file lies under the folder."""

from __future__ import annotations

import filecmp
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dqe_engine.errors import InputError
from dqe_engine.files import describe_os_error

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})


@dataclass(frozen=True)
class ImageFolder:
    """`names`: id to path relative to `root`, as POSIX text."""

    root: Path
    names: Mapping[str, str]

    @classmethod
    def scan(cls, root: Path) -> ImageFolder:
        """Walk the folder once, nested folders and links to folders too; hidden files are left out.

        Copies of an image count as one: FashionIQ's shirts and tops share 3,302 images, and lie in a folder each. Raises
        InputError where the folder cannot be listed, and where two files of one id differ, naming both.
        """
        if not root.is_dir():
            raise InputError(f"{root}: no such image folder")
        names: dict[str, str] = {}
        for path in image_files(root):
            name, id = path.relative_to(root).as_posix(), path.stem
            if names.setdefault(id, name) != name and not _same_content(root / names[id], path):
                raise InputError(f"{root}: two different images have the id {id!r}: {names[id]} and {name}; keep one of them")
        return cls(root, names)

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, id: object) -> bool:
        return id in self.names

    def missing(self, ids: Iterable[str]) -> tuple[str, ...]:
        """The ids that have no file, each once, in the order given."""
        return tuple(id for id in dict.fromkeys(ids) if id not in self.names)


def image_files(root: Path) -> list[Path]:
    """The images under `root`, by path; hidden files are left out. Raises InputError where a folder cannot be listed."""
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


def _same_content(one: Path, other: Path) -> bool:
    try:
        return filecmp.cmp(one, other, shallow=False)
    except OSError as error:
        raise InputError(describe_os_error(error)) from error


def _unreadable(error: OSError) -> None:
    raise InputError(describe_os_error(error)) from error
