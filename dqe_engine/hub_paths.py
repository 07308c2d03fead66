"""Names and paths of the Hugging Face hub: references to a repository, and the layout of the cache that its client keeps.

Nothing is imported or asked here: this tells what a string or a folder is.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from .errors import InputError

_FORM = "hf://OWNER/NAME, or hf://OWNER/NAME@REVISION with a branch, a tag or a commit"
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_REVISION = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*", re.ASCII)
_SCHEME = re.compile("hf:/{1,2}")  # `Path` makes one slash of two
_COMMIT = re.compile("[0-9a-f]{40}")
_FOLDER = re.compile(r"models--([A-Za-z0-9][\w.-]*?)--([A-Za-z0-9][\w.-]*)", re.ASCII)
_BLOB = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")
_STORED = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class HubReference:
    """A repository of models on the hub. `revision`: a branch, a tag or a commit; None for the default branch."""

    repository: str
    revision: str | None = None

    @classmethod
    def parse(cls, source: str | os.PathLike[str]) -> HubReference:
        """Raises InputError for what does not have the form."""
        text = os.fspath(source)
        repository, at, revision = _SCHEME.sub("", text, count=1).partition("@")
        if not is_reference(text) or (at and (".." in revision or not _REVISION.fullmatch(revision))):
            raise InputError(f"{text}: not a name on the hub; expected {_FORM}")
        return cls(check_repository(repository), revision or None)

    @property
    def is_commit(self) -> bool:
        return self.revision is not None and bool(_COMMIT.fullmatch(self.revision))

    def __str__(self) -> str:
        return f"hf://{self.repository}" + (f"@{self.revision}" if self.revision else "")


def is_reference(source: str | os.PathLike[str]) -> bool:
    """Whether this names a repository on the hub rather than a folder."""
    return bool(_SCHEME.match(str(os.fspath(source))))


def check_repository(name: str) -> str:
    """`name`, where it is OWNER/NAME as the hub allows it. Raises InputError."""
    if not _REPOSITORY.fullmatch(name) or "--" in name or ".." in name or name.endswith((".git", ".ipynb")):
        raise InputError(f"{name!r}: not a repository's name; expected OWNER/NAME of letters, digits, single '-' and '.', and '_'")
    return name


@dataclass(frozen=True)
class Snapshot:
    """A repository at one commit in the client's cache: `folder` is CACHE/models--OWNER--NAME/snapshots/COMMIT, without links in it."""

    folder: Path
    reference: HubReference

    @classmethod
    def at(cls, path: Path) -> Snapshot | None:
        """None where `path` is another kind of folder."""
        folder = path.resolve()
        repository = folder.parents[1] if len(folder.parents) > 1 else folder
        name = _FOLDER.fullmatch(repository.name)
        if name is None or folder.parent.name != "snapshots" or not _COMMIT.fullmatch(folder.name):
            return None
        return cls(folder, HubReference(f"{name[1]}/{name[2]}", folder.name))

    @property
    def repository(self) -> Path:
        """The folder of all that the cache has of the repository."""
        return self.folder.parents[1]

    def links(self, file: Path) -> bool:
        """Whether `file`, of this folder, is a link as the client makes them, to a file of the same cache: to
        models--OWNER--NAME/blobs/HASH, which may itself be a link to CACHE/blobs/HA/HASH, where repositories share what they both have.
        Any other way that a link may go, through linked folders too, is False."""
        folder = file.parent.resolve()
        blob = _pointed_to(folder / file.name)
        if not folder.is_relative_to(self.folder) or blob is None:
            return False
        if blob.parent != self.repository / "blobs" or not _BLOB.fullmatch(blob.name):
            return False
        if (stored := _pointed_to(blob)) is not None:
            if stored.parent != self.repository.parent / "blobs" / stored.name[:2] or not _STORED.fullmatch(stored.name):
                return False
            blob = stored
        return blob.resolve() == blob


def _pointed_to(link: Path) -> Path | None:
    """Where a link in a folder without links points, one step; None for what is no link."""
    return Path(os.path.normpath(link.parent / os.readlink(link))) if link.is_symlink() else None
