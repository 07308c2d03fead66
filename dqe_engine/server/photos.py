"""`Photos`: the images that items were made from, and small pictures of them to look at."""

from __future__ import annotations

import errno
import io
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import features

from dqe_engine.errors import DQEError, InputError, OverloadError
from dqe_engine.image_policy import DEFAULT_POLICY, ImagePolicy
from dqe_engine.preprocessing import open_reduced

from .uploads import UploadError, Uploads, content_of

__all__ = ["SIZES", "NoPhotoError", "Original", "Photos", "Thumbnail", "UploadError", "content_of"]

SIZES = (160, 320, 640)
"""Of thumbnails: pixels on the longer side."""
_QUALITY = 85
_RENDERER = "1"
"""Part of every ETag: another number once the same image would give other bytes."""
_ENTRY_BYTES = 512
_TRIES = 3
_LONGEST_NAME = 4096
_NAME = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
_FOLDER = _NAME | os.O_DIRECTORY
_FILE = _NAME | os.O_NONBLOCK | os.O_NOCTTY
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


class NoPhotoError(DQEError):
    """No image of an item is at hand: there is none, it may not be read, or it is damaged."""


class _DamagedError(NoPhotoError):
    """`version`: of the bytes that cannot be decoded, or may not be."""

    def __init__(self, message: str, version: str) -> None:
        super().__init__(message)
        self.version = version


@dataclass(frozen=True)
class Original:
    """The bytes of an image. `version`: another one wherever the bytes may be others."""

    data: bytes
    version: str


@dataclass(frozen=True)
class Thumbnail:
    """`etag`: with its quotes, as in the header."""

    data: bytes
    media_type: str
    etag: str


class _Place(NamedTuple):
    """An open file, its size and state when it was opened, and what it may be called in a cache."""

    descriptor: int
    size: int
    state: str
    version: str


class Photos:
    """Finds the image of an item: of an upload by the item's content, else in the photo folder of whose prefix its id begins.

    Threads may share it. Links are followed nowhere below a photo folder, and only regular files within the policy's `max_bytes` are read:
    whatever an id says, nothing outside the folders is. An id that names nothing is no error but no image.
    """

    def __init__(
        self,
        folders: Sequence[tuple[str, Path]] = (),
        uploads: Path | None = None,
        *,
        policy: ImagePolicy = DEFAULT_POLICY,
        cache_bytes: int = 64 << 20,
    ) -> None:
        """folders: (prefix, folder); an item is looked for in those with the longest prefix that its id has, in their order. uploads:
        made when something is stored. cache_bytes: of thumbnails, together."""
        self._folders = tuple((prefix, Path(folder).absolute()) for prefix, folder in folders)
        self._uploads = None if uploads is None else Uploads(Path(uploads).absolute())
        self._policy = policy
        self._lock = threading.Lock()  # brief: guards what follows
        self._kept: OrderedDict[tuple[str, int], Thumbnail | str] = OrderedDict()
        self._kept_bytes, self._most_bytes = 0, cache_bytes
        self._flights: dict[tuple[str, int], Future[Thumbnail]] = {}

    @property
    def cached_bytes(self) -> int:
        return self._kept_bytes

    def original(self, id: str, content: str | None) -> Original:
        """The bytes that the item was made from, or those that lie under its name now. Raises NoPhotoError, OverloadError."""
        for _ in range(_TRIES):
            place = self._open(id, content)
            try:
                data = _read(place)
            finally:
                os.close(place.descriptor)
            if data is not None:
                return Original(data, place.version)
        raise NoPhotoError(f"{id[:200]!r}: its image is being written; ask again")

    def etag(self, id: str, content: str | None, size: int) -> str:
        """Of the thumbnail, without making it. Raises NoPhotoError, InputError, OverloadError."""
        _check_size(size)
        return _etag(self._version(id, content), size)

    def kept(self, id: str, content: str | None, size: int) -> Thumbnail | None:
        """The thumbnail, if it need not be made. Raises as `thumbnail`."""
        _check_size(size)
        version = self._version(id, content)
        with self._lock:
            return self._kept_of((version, size))

    def thumbnail(self, id: str, content: str | None, size: int) -> Thumbnail:
        """At most `size` pixels on its longer side, upright, without metadata: JPEG, or WebP (PNG where Pillow has none) where something
        shines through. Kept, and made once for callers that ask for it at the same time. Making one may take as much memory as the policy
        allows: the caller bounds how many are made at once.

        Raises NoPhotoError, also for an image that is damaged or over the policy's limits; InputError for another size; OverloadError.
        """
        _check_size(size)
        version = self._version(id, content)
        key = (version, size)
        with self._lock:
            if (kept := self._kept_of(key)) is not None:
                return kept
            flight = self._flights.get(key)
            if leads := flight is None:
                flight = self._flights[key] = Future()
        assert flight is not None
        if not leads:
            return flight.result()
        try:
            made = self._make(id, content, size)
        except _DamagedError as error:
            if error.version == version and "not enough memory" not in str(error):
                self._keep(key, str(error))
            flight.set_exception(error.with_traceback(None))
            raise
        except BaseException as error:
            told = error if isinstance(error, DQEError) else OverloadError("another request for this thumbnail failed; ask again")
            flight.set_exception(told.with_traceback(None))
            raise
        else:
            flight.set_result(made)
            if made.etag == _etag(*key):  # else the file changed before it was read
                self._keep(key, made)
            return made
        finally:
            with self._lock:
                del self._flights[key]

    def store(self, data: bytes) -> str:
        """Keep an upload; its content. On the disk when this returns. Raises UploadError."""
        return self._require_uploads().store(data)

    def has_upload(self, content: str | None) -> bool:
        return self._uploads is not None and self._uploads.has(content)

    def remove(self, content: str) -> bool:
        """Delete the upload with this content, which no item has any more; whether there was one. Raises UploadError."""
        return self._uploads is not None and self._uploads.remove(content)

    def _require_uploads(self) -> Uploads:
        if self._uploads is None:
            raise UploadError("the server has no folder for uploads; start it with --uploads FOLDER")
        return self._uploads

    def _version(self, id: str, content: str | None) -> str:
        """Raises as `_open`."""
        place = self._open(id, content)
        os.close(place.descriptor)
        return place.version

    def _kept_of(self, key: tuple[str, int]) -> Thumbnail | None:
        """With the lock. Raises NoPhotoError for an image that is known to be damaged."""
        if (kept := self._kept.get(key)) is None:
            return None
        self._kept.move_to_end(key)
        if isinstance(kept, Thumbnail):
            return kept
        raise NoPhotoError(kept)

    def _open(self, id: str, content: str | None) -> _Place:
        """Raises NoPhotoError, OverloadError."""
        if self._uploads is not None and content is not None and (path := self._uploads.path(content)) is not None:
            found = self._open_below(self._uploads.folder, f"{path.parent.name}/{path.name}")
            if found is not None:
                return found._replace(version=content)
        longest = max((len(prefix) for prefix, _ in self._folders if id.startswith(prefix)), default=-1)
        for prefix, folder in self._folders:
            if len(prefix) == longest and id.startswith(prefix) and (found := self._open_below(folder, id[longest:])) is not None:
                return found
        raise NoPhotoError(f"{id[:200]!r}: the server has no image of this item; start it with --images FOLDER, or upload the image")

    def _open_below(self, folder: Path, name: str) -> _Place | None:
        parts = _parts(name)
        if parts is None:
            return None
        try:
            descriptor = _open_regular_below(folder, parts)
        except OSError as error:
            if error.errno in _EXHAUSTED:
                raise OverloadError("no more files can be opened; ask again later, or raise the limit: ulimit -n 4096") from error
            return None
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size > self._policy.max_bytes:
            os.close(descriptor)
            return None
        return _Place(descriptor, status.st_size, _state(status), _state(status))

    def _make(self, id: str, content: str | None, size: int) -> Thumbnail:
        original = self.original(id, content)
        try:
            data, media_type = _rendered(original.data, size, self._policy)
        except InputError as error:
            raise _DamagedError(f"{id[:200]!r}: {error}", original.version) from error
        return Thumbnail(data, media_type, _etag(original.version, size))

    def _keep(self, key: tuple[str, int], made: Thumbnail | str) -> None:
        """`made`: or what is wrong with the image, since decoding it to find out again takes as long."""
        if _kept_bytes(made) > self._most_bytes:
            return
        with self._lock:
            if key in self._kept:
                return
            self._kept[key] = made
            self._kept_bytes += _kept_bytes(made)
            while self._kept_bytes > self._most_bytes:
                self._kept_bytes -= _kept_bytes(self._kept.popitem(last=False)[1])


def _kept_bytes(made: Thumbnail | str) -> int:
    return _ENTRY_BYTES + (len(made) if isinstance(made, str) else len(made.data))


def _check_size(size: int) -> None:
    if size not in SIZES:
        raise InputError(f"size: expected one of {', '.join(map(str, SIZES))}, got {str(size)[:20]}")


def _etag(version: str, size: int) -> str:
    return f'"{version}-{size}-{_RENDERER}"'


def _state(status: os.stat_result) -> str:
    return f"{status.st_dev:x}.{status.st_ino:x}.{status.st_size:x}.{status.st_mtime_ns:x}"


def _parts(name: str) -> list[bytes] | None:
    """The components of a path relative to a folder; None for a name that no file in it can have."""
    if len(name) > _LONGEST_NAME:
        return None
    try:
        parts = name.encode("utf-8").split(b"/")
    except UnicodeEncodeError:
        return None
    return None if b"\0" in b"".join(parts) or any(part in (b"", b".", b"..") for part in parts) else parts


def _open_regular_below(folder: Path, parts: Sequence[bytes]) -> int:
    """A descriptor of the file, which is not yet known to be a regular one. Raises OSError, also where a component is a link."""
    at = os.open(folder, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
    try:
        for part in parts[:-1]:
            below = os.open(part, _FOLDER, dir_fd=at)
            os.close(at)
            at = below
        if not stat.S_ISREG(os.stat(parts[-1], dir_fd=at, follow_symlinks=False).st_mode):  # opening a device may do something
            raise OSError(errno.EINVAL, "not a regular file")
        return os.open(parts[-1], _FILE, dir_fd=at)
    finally:
        os.close(at)


def _read(place: _Place) -> bytes | None:
    """None for a file that changes meanwhile."""
    try:
        with open(place.descriptor, "rb", closefd=False) as stream:
            data = stream.read(place.size)
        after = os.fstat(place.descriptor)
    except OSError as error:
        raise NoPhotoError(f"its image cannot be read ({error.strerror})") from error
    return data if len(data) == place.size and _state(after) == place.state else None


def _rendered(data: bytes, size: int, policy: ImagePolicy) -> tuple[bytes, str]:
    """A thumbnail and its media type. Raises InputError."""
    image, stream = open_reduced(data, size, policy), io.BytesIO()
    if image.mode == "RGB":
        image.save(stream, "JPEG", quality=_QUALITY)
        return stream.getvalue(), "image/jpeg"
    if features.check("webp"):
        image.save(stream, "WEBP", quality=_QUALITY, method=2)
        return stream.getvalue(), "image/webp"
    image.save(stream, "PNG")
    return stream.getvalue(), "image/png"
