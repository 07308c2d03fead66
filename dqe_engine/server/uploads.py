"""`Uploads`: the bytes of images that came over the network, by their content, so that the same image is kept once."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import stat
import time
from collections.abc import Collection, Iterator
from pathlib import Path

from dqe_engine.errors import DQEError
from dqe_engine.files import (
    TEMPORARY_PREFIX,
    atomic_write,
    describe_os_error,
    describe_write_error,
    directory_lock,
    fsync_path,
    make_directories,
    open_in_place,
)
from dqe_engine.index import GalleryIndex

MARKER = "dqe-uploads"
"""Name of the file by which a folder is known to be ours; nothing is deleted in one that lacks it."""
_MARK = b"uploads of dqe-serve\n"
_CONTENT = re.compile(r"[0-9a-f]{32}")
_FOLDER = re.compile(r"[0-9a-f]{2}")
_FILE = re.compile(r"[0-9a-f]{30}")
_DIGEST_BYTES = 16  # as of `Indexer`


class UploadError(DQEError):
    """An uploads folder that cannot be used, or a disk that refuses. Its `__cause__` is the OSError, if there was one."""


def content_of(data: bytes) -> str:
    """The hash by which `Indexer` knows a file of these bytes."""
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES).hexdigest()


class Uploads:
    """A folder `aa/bbbb…` of files named by the hash of what is in them. Threads and processes may share it.

    Made at the first `store`. `store` holds a shared lock, what deletes an exclusive one: an upload that comes again while it is swept is
    either kept or stored anew.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, content: str | None) -> Path | None:
        """Where the bytes of this content are, or would be; None for what is no hash of a file."""
        if content is None or not _CONTENT.fullmatch(content):
            return None
        return self.folder / content[:2] / content[2:]

    def has(self, content: str | None) -> bool:
        path = self.path(content)
        try:
            return path is not None and stat.S_ISREG(os.lstat(path).st_mode)
        except OSError:
            return False

    def store(self, data: bytes) -> str:
        """Keep these bytes; on the disk when this returns. Their content. Raises UploadError."""
        content = content_of(data)
        path = self.path(content)
        assert path is not None
        try:
            self._make()
            with self._locked(fcntl.LOCK_SH):
                if _holds(path, data):
                    os.utime(path)  # as if new, for `sweep`
                    fsync_path(path.parent)  # whoever stored it may have been killed before that
                else:
                    with atomic_write(path) as stream:
                        stream.write(data)
        except OSError as error:
            raise UploadError(describe_write_error(error, self.folder)) from error
        return content

    def remove(self, content: str) -> bool:
        """Delete the bytes of this content, of which no item is left; whether there were any. Raises UploadError."""
        path = self.path(content)
        if path is None or not self.has(content):
            return False
        try:
            with self._locked(fcntl.LOCK_EX):
                os.unlink(path)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise UploadError(describe_os_error(error, self.folder)) from error
        return True

    def sweep(self, known: Collection[str], older_than: float, *, delete: bool = True) -> int:
        """Delete what no item refers to and is older than so many seconds, and what killed writers left; how many files that were.

        known: contents of the index's items, all of them. older_than: what was stored since may be on its way into the index. delete:
        else they are counted alone. Raises UploadError.
        """
        if not self.folder.is_dir():
            return 0
        try:
            with self._locked(fcntl.LOCK_EX):
                before, gone = time.time() - older_than, 0
                for path, content in self._files():
                    if content not in known and os.lstat(path).st_mtime <= before:
                        if delete:
                            os.unlink(path)
                        gone += 1
                return gone
        except OSError as error:
            raise UploadError(describe_os_error(error, self.folder)) from error

    def _files(self) -> Iterator[tuple[Path, str | None]]:
        """Regular files of ours, with their content, None for the remains of a killed writer."""
        for folder in os.scandir(self.folder):
            if not _FOLDER.fullmatch(folder.name) or not folder.is_dir(follow_symlinks=False):
                continue
            for file in os.scandir(folder.path):
                if not file.is_file(follow_symlinks=False):
                    continue
                if _FILE.fullmatch(file.name):
                    yield Path(file.path), folder.name + file.name
                elif file.name.startswith(TEMPORARY_PREFIX):
                    yield Path(file.path), None

    def _make(self) -> None:
        """The folder and its marker. Raises UploadError for a folder that holds other things."""
        marker = self.folder / MARKER
        if marker.exists():
            return
        make_directories(self.folder)
        others = sorted(name for name in os.listdir(self.folder) if not name.startswith(TEMPORARY_PREFIX) and name != MARKER)
        if others and not marker.exists():  # else another process has just made it
            named = ", ".join(others[:3]) + (", …" if len(others) > 3 else "")
            raise UploadError(f"{self.folder} holds other things ({named}) and no {MARKER}, so nothing is stored there; name a new folder")
        with atomic_write(marker) as stream:
            stream.write(_MARK)

    @contextlib.contextmanager
    def _locked(self, how: int) -> Iterator[None]:
        """Raises UploadError for a folder that is not ours."""
        try:
            descriptor = open_in_place(self.folder / MARKER, os.O_RDONLY)
        except FileNotFoundError as error:
            raise UploadError(f"{self.folder} has no {MARKER}, so it is no folder of uploads; nothing was deleted") from error
        try:
            if os.pread(descriptor, len(_MARK), 0) != _MARK:
                raise UploadError(f"{self.folder / MARKER} is something else; name a new folder for the uploads")
            fcntl.flock(descriptor, how)
            yield
        finally:
            os.close(descriptor)


def _holds(path: Path, data: bytes) -> bool:
    """Whether these very bytes are there: a file may be damaged."""
    try:
        descriptor = open_in_place(path, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        return False
    except OSError as error:
        if error.errno == errno.ELOOP:  # a link: replaced by the file
            return False
        raise
    with open(descriptor, "rb") as stream:
        status = os.fstat(descriptor)
        return stat.S_ISREG(status.st_mode) and status.st_size == len(data) and stream.read() == data


def sweep_uploads(index: Path, folder: Path, *, older_than: float = 3600.0, delete: bool = True) -> int:
    """`Uploads.sweep` of the folder that belongs to an index, while nobody writes to that. How many files that were, or would be.

    Only whoever runs the server knows whose a folder of uploads is, so no server does this by itself. Raises IndexFormatError and
    UploadError.
    """
    try:
        with directory_lock(index), GalleryIndex.load(index, screened=False) as loaded:
            return Uploads(folder.absolute()).sweep(loaded.snapshot().contents(), older_than, delete=delete)
    except OSError as error:
        raise UploadError(describe_os_error(error, index)) from error
