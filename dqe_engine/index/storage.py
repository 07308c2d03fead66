"""An index on disk: a manifest that is replaced atomically, and the append-only files of which it confirms a prefix.

    manifest.json             sizes and checksums of the confirmed prefixes, model hash, shapes, revision
    <generation>.catalogue    one JSON line per event: a row added (id, metadata, content) or a row removed (position)
    <generation>.targets      raw rows (M, D), little-endian f32 or f16: one file, so that a search maps one array
    <generation>.images       raw rows (P, Hv), where image tokens are cached
    lock                      held (flock) while saving; by what is in it, a folder is known to be an index's before there is a manifest

A save appends behind the confirmed prefix, flushes to the disk, then replaces the manifest. Killed before that, the old
manifest still describes what is there and the next save cuts the rest off. Compaction writes a new generation; files
that no manifest names are removed by the save after it, so that a reader that just read the manifest still finds them.
Nothing is written to a folder that holds other things and no index.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from dqe_engine.contracts.parsing import NOT_JSON, Contract, to_json
from dqe_engine.contracts.versioned import Versioned, read_document
from dqe_engine.errors import IndexConflictError, IndexFormatError
from dqe_engine.files import (
    TEMPORARY_PREFIX,
    atomic_write,
    describe_os_error,
    describe_write_error,
    fsync_path,
    make_directories,
    open_in_place,
    require_regular,
)

Storage = Literal["f32", "f16"]
ImageStorage = Literal["none", "f16", "f32"]
DTYPES = {"f32": "<f4", "f16": "<f2"}

SCHEMA_VERSION = 2
MANIFEST_FILE = "manifest.json"
LOCK_FILE = "lock"
_MARK = b"gallery-index\n"
_DATA_FILE = re.compile(r"[0-9a-f]{8}\.(?:catalogue|targets|images)")
_WRITE_BYTES = 1 << 24
_MOST_SIDE = 1 << 24  # of a row's shape: beyond any model's, within what arrays can have


class FileState(Contract, frozen=True, kw_only=True):
    """The confirmed prefix of an append-only file."""

    name: str
    size: int = 0
    crc32: int = 0

    def __post_init__(self) -> None:
        if not _DATA_FILE.fullmatch(self.name):
            raise ValueError(f"{self.name!r} is not a file of an index")
        if not 0 <= self.size < 2**62:
            raise ValueError(f"{self.name}: expected a size of 0 bytes or more, got {self.size}")


class IndexManifest(Versioned, frozen=True, kw_only=True):
    """`revision` changes with every save; a writer that does not know the one on disk is out of date.

    Schema version 1 had no `kind`.
    """

    kind: Literal["gallery-index"] = "gallery-index"
    schema_version: int = SCHEMA_VERSION
    model_hash: str
    revision: str
    rows: int
    storage: Storage
    image_storage: ImageStorage
    target_shape: tuple[int, int]
    image_shape: tuple[int, int]
    catalogue: FileState
    targets: FileState
    images: FileState | None

    def __post_init__(self) -> None:
        sides = (*self.target_shape, *self.image_shape)
        if self.rows < 0 or not 1 <= min(sides) <= max(sides) <= _MOST_SIDE:
            raise ValueError(
                f"expected rows of at least 0 and sides of 1 to {_MOST_SIDE}, got {self.rows}, {self.target_shape} and {self.image_shape}"
            )

    @property
    def files(self) -> tuple[FileState, ...]:
        return (self.catalogue, self.targets, *([self.images] if self.images else []))


class Event(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """A catalogue line: a row added (`id`, optional `metadata` and `content`), or the row at position `removed` gone.

    `content`: a hash of the image that the row was made from. `crc32`: of the added row's target tokens, continued by its image tokens.
    None in indexes that were made before these were recorded.
    """

    id: str | None = None
    metadata: dict[str, Any] | None = None
    content: str | None = None
    removed: int | None = None
    crc32: int | None = None


def read_manifest(root: Path) -> IndexManifest | None:
    """The manifest in `root`, or None where there is none. Raises IndexFormatError for one that cannot be used."""
    try:
        return read_document(IndexManifest, root / MANIFEST_FILE, remedy="restore it from a copy or index again", error=IndexFormatError)
    except (FileNotFoundError, NotADirectoryError):
        return None


def read_manifest_to_replace(root: Path) -> IndexManifest | None:
    """The manifest, or None also where it is too damaged to say which files belong to it, in a folder that is known to be an index's."""
    try:
        return read_manifest(root)
    except IndexFormatError:
        if not _is_ours(root):
            raise
        return None


T = TypeVar("T")


def read_with_manifest(root: Path, read: Callable[[IndexManifest], T]) -> T | None:
    """What `read` makes of the present manifest; None where there is no index.

    A writer may have compacted twice between the manifest and its files: then there is a newer manifest to go by. Raises
    IndexFormatError, also for files that are missing or cannot be read.
    """
    manifest = read_manifest(root)
    while manifest is not None:
        try:
            return read(manifest)
        except OSError as error:
            newer = read_manifest(root)
            if newer == manifest:
                if isinstance(error, FileNotFoundError):
                    raise IndexFormatError(f"{error.filename}: missing; restore it from a copy or index again") from error
                raise IndexFormatError(describe_os_error(error)) from error
            manifest = newer
    return None


def write_manifest(root: Path, manifest: IndexManifest) -> None:
    with atomic_write(root / MANIFEST_FILE) as stream:
        stream.write(to_json(manifest))


def new_revision() -> str:
    return secrets.token_hex(8)


@contextlib.contextmanager
def writing(root: Path) -> Iterator[None]:
    """Hold the directory's lock, creating the directory where needed. Disk errors leave as IndexFormatError.

    Raises IndexConflictError for a directory that holds other things and no index.
    """
    try:
        make_directories(root)
        descriptor = None
        try:
            others = sorted(entry.name for entry in root.iterdir() if entry.name != LOCK_FILE)
            descriptor = open_in_place(root / LOCK_FILE, os.O_RDWR | os.O_CREAT) if not others or _is_ours(root) else None
            if descriptor is None or not _MARK.startswith(_mark_in(descriptor)):
                named = ", ".join(others[:3] or [LOCK_FILE]) + (", …" if len(others) > 3 else "")
                raise IndexConflictError(f"{root} holds other things ({named}) and no index; name a new folder")
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # released by the kernel even when we are killed
            if _mark_in(descriptor) != _MARK or not (root / MANIFEST_FILE).exists():
                os.pwrite(descriptor, _MARK, 0)
                os.fsync(descriptor)  # before there is a file that only the mark tells from somebody's
                fsync_path(root)
                with contextlib.suppress(PermissionError):  # who made the folder may keep what is around it to himself
                    fsync_path(root.parent)
            yield
        finally:
            if descriptor is not None:
                os.close(descriptor)
    except OSError as error:
        raise IndexFormatError(describe_write_error(error, root)) from error


def _is_ours(root: Path) -> bool:
    """Whether `root` is an index's folder: a lock that says so, or, of a version whose locks were empty, a manifest that does."""
    try:
        descriptor = open_in_place(root / LOCK_FILE, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        found = _mark_in(descriptor)
    finally:
        os.close(descriptor)
    if found == _MARK:
        return True
    with contextlib.suppress(IndexFormatError):
        return not found and read_manifest(root) is not None
    return False


def _mark_in(lock: int) -> bytes:
    """Without the zeros that a power cut leaves of what was not yet on the disk."""
    return os.pread(lock, len(_MARK) + 1, 0).strip(b"\0")


def remove_orphans(root: Path, keep: IndexManifest | None) -> tuple[str, ...]:
    """Remove our files that `keep` does not name: earlier generations and what killed saves left. Returns their names, sorted.

    While `writing`, which knows that the folder is ours."""
    named = {state.name for state in keep.files} if keep else set()
    orphans = [
        file
        for file in root.iterdir()
        if file.name not in named and (_DATA_FILE.fullmatch(file.name) or file.name.startswith(TEMPORARY_PREFIX))
    ]
    if orphans:
        fsync_path(root)  # whoever wrote `keep` may have been killed before it was sure, and the manifest before it needs these
    for file in orphans:
        file.unlink()
    return tuple(sorted(file.name for file in orphans))


def extend(root: Path, state: FileState, chunks: Iterable[bytes | NDArray[Any]]) -> FileState:
    """Append `chunks` behind the confirmed prefix (a file of size 0 is created) and flush; returns the longer prefix."""
    path, size, crc = root / state.name, state.size, state.crc32
    if state.size and (not path.is_file() or path.stat().st_size < state.size):
        raise IndexFormatError(f"{path}: missing or shorter than its confirmed {state.size} bytes; restore it from a copy or index again")
    with os.fdopen(open_in_place(path, os.O_RDWR | (0 if state.size else os.O_CREAT)), "r+b") as stream:
        stream.truncate(size)  # what a killed save left behind
        stream.seek(size)
        for chunk in chunks:
            data = chunk if isinstance(chunk, bytes) else chunk.reshape(-1).view(np.uint8).data
            stream.write(data)
            crc = zlib.crc32(data, crc)
            size += len(data)
        stream.flush()
        os.fsync(stream.fileno())
    if not state.size:
        fsync_path(root)  # its name, too, before a manifest is that has it
    return FileState(name=state.name, size=size, crc32=crc)


def encode_events(events: Sequence[Event]) -> bytes:
    return msgspec.json.Encoder().encode_lines(events)


def read_events(root: Path, state: FileState, *, since: FileState | None = None) -> list[Event]:
    """The confirmed catalogue, or what was appended to it `since` a shorter prefix, checksum verified. Raises IndexFormatError."""
    path, start, crc = root / state.name, since.size if since else 0, since.crc32 if since else 0
    require_regular(path)
    with open(path, "rb") as stream:
        here = os.fstat(stream.fileno()).st_size >= state.size  # else a damaged size could ask for more memory than there is
        stream.seek(start)
        raw = stream.read(state.size - start) if here else b""
    if len(raw) != state.size - start or zlib.crc32(raw, crc) != state.crc32:
        raise IndexFormatError(f"{path}: the catalogue is damaged (checksum differs); restore it from a copy or index again")
    try:
        return msgspec.json.Decoder(Event).decode_lines(raw)
    except NOT_JSON as error:
        raise IndexFormatError(f"{path}: the catalogue is damaged ({error}); restore it from a copy or index again") from error


def map_rows(root: Path, state: FileState, rows: int, shape: tuple[int, int], storage: str, *, verify: bool) -> NDArray[Any]:
    """The confirmed rows, memory-mapped read-only: (rows, *shape). `verify` reads them all and holds the checksum."""
    path, dtype = root / state.name, np.dtype(DTYPES[storage])
    if state.size != rows * shape[0] * shape[1] * dtype.itemsize:
        raise IndexFormatError(f"{path}: {state.size} bytes do not make {rows} rows of {shape}; index again")
    if (found := path.stat().st_size) < state.size:
        raise IndexFormatError(f"{path}: {found} bytes, of which {state.size} were confirmed; restore it from a copy or index again")
    if state.size == 0:
        return np.empty((0, *shape), dtype)
    array = np.asarray(np.memmap(path, dtype, "r", shape=(rows, *shape)))
    if verify:
        crc, flat = 0, array.reshape(-1).view(np.uint8)
        for start in range(0, flat.size, _WRITE_BYTES):
            crc = zlib.crc32(flat[start : start + _WRITE_BYTES].data, crc)
        if crc != state.crc32:
            raise IndexFormatError(f"{path}: its bytes changed (checksum differs); restore it from a copy or index again")
    return array
