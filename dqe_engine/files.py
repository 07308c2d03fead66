"""Files that are either whole or absent: temporary name in the same folder, fsync, atomic rename."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

TEMPORARY_PREFIX = ".tmp-"
"""Of what is to become another file or directory. A killed run leaves it behind; it is removed only in folders known to be ours."""
_OLD = "old"  # within a temporary: what is being replaced
_GONE = "gone"  # what was replaced, and is being removed


_REMEDIES = {
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "a part of the path is a file; check the path",
    errno.EISDIR: "expected a file; check the path",
    errno.EEXIST: "choose another name, or remove it yourself",
    errno.EACCES: "grant this user access to it, or run as its owner",
    errno.EPERM: "grant this user access to it, or run as its owner",
    errno.EROFS: "choose a place that can be written to",
    errno.ENOSPC: "free some space, then run the same command again",
    errno.EDQUOT: "free some of your quota, then run the same command again",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f), or choose a disk that takes larger files",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "its links lead in a circle; mend them",
    errno.EMFILE: "raise the limit of open files: ulimit -n 4096",
    errno.EIO: "the disk or its connection fails; look into the system's log",
}


def describe_os_error(error: OSError, path: str | os.PathLike[str] | None = None) -> str:
    """One line for the user: which file, what the system says, what to do. `a.json: permission denied; grant this user …`.

    `path`: the file, where the error does not name one (reading and writing raise such).
    """
    if error.strerror is None:  # raised by a library, in its own words
        return " ".join(str(error).split()) or type(error).__name__
    said = error.strerror[:1].lower() + error.strerror[1:]
    name = path if error.filename is None or isinstance(error.filename, int) else error.filename  # a descriptor names nothing
    where = "" if name is None else f"{name}: "
    return f"{where}{said}{_remedy(error)}"


def require_regular(path: str | os.PathLike[str]) -> os.stat_result:
    """Its status. Raises OSError for what is no regular file, or no link to one: a pipe would be waited for."""
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file; give a copy of its content", os.fspath(path))
    return status


def read_regular(path: str | os.PathLike[str]) -> bytes:
    """A file's bytes. Raises OSError, for what is no regular file too (see `require_regular`)."""
    require_regular(path)
    with open(path, "rb") as stream:
        return stream.read()


def describe_write_error(error: OSError, out: Path) -> str:
    """`describe_os_error` for what was to become `out`: `out: cannot be written (Permission denied); grant this user …`.

    An error of another file, one that was read meanwhile, is told as that file's.
    """
    if error.strerror is None:
        return describe_os_error(error)
    if error.filename is not None:
        place, file = out.absolute(), Path(os.fsdecode(error.filename)).absolute()
        within = file.relative_to(place.parent).parts if file.is_relative_to(place.parent) else ()
        ours = within and (within[0] == place.name or within[0].startswith((TEMPORARY_PREFIX, f"{place.name}.")))
        if not (ours or place.is_relative_to(file)):
            return describe_os_error(error)
    return f"{out}: cannot be written ({error.strerror}){_remedy(error)}"


def _remedy(error: OSError) -> str:
    remedy = _REMEDIES.get(error.errno or 0)
    return f"; {remedy}" if remedy else ""


def cache_home() -> Path:
    """The folder of this user's caches: `XDG_CACHE_HOME`, else ~/.cache. Raises RuntimeError for a user without a home directory."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    return Path(named) if os.path.isabs(named) else Path.home() / ".cache"  # the specification says to ignore relative ones


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, as 64 hexadecimal digits. Raises OSError, for what is no regular file too."""
    require_regular(path)
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fsync_path(path: Path) -> None:
    """Flush a file or a directory entry to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directories(path: Path) -> None:
    """`path` and the parents that it lacks, each on the disk before this returns: else a file in them that was flushed could be lost
    with them."""
    missing = []
    while not path.is_dir():
        missing.append(path)
        path = path.parent
    for directory in reversed(missing):
        directory.mkdir(exist_ok=True)
        fsync_path(directory.parent)


def open_in_place(path: Path, flags: int) -> int:
    """A descriptor of the file `path` itself: of a link, whose target may be anybody's file, it is refused with OSError (ELOOP).

    A file that `flags` create has the permissions that the process's umask leaves.
    """
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


@contextlib.contextmanager
def atomic_write(path: Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a temporary file that becomes `path` when the block ends, and vanishes when the block raises."""
    path = Path(path)
    make_directories(path.parent)
    name = path.parent / f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}"
    descriptor = open_in_place(name, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    try:
        with os.fdopen(descriptor, mode, encoding=None if "b" in mode else "utf-8") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise
    fsync_path(path.parent)


@contextlib.contextmanager
def atomic_directory(path: Path, *, replace: bool = False, marker: str | None = None) -> Iterator[Path]:
    """Yield an empty temporary directory beside `path` that becomes `path` when the block ends.

    With `replace`, an existing directory is moved aside just before the rename and removed after it; should the rename
    fail, it is put back, and killed in between, `recover_directory` puts it back. `marker`: a file that every directory
    of this kind has; what is neither empty nor has it is never replaced, as it is something else under a mistaken name.
    Raises `FileExistsError`, at once, when `path` exists and may not be replaced. Remains of killed runs are removed.
    """
    path = Path(path)
    recover_directory(path)
    _check_free(path, replace, marker)
    with scratch_directory(path) as temporary:
        yield temporary
        for file in temporary.rglob("*"):
            fsync_path(file)
        fsync_path(temporary)
        _check_free(path, replace, marker)  # the block may have taken hours
        if os.path.lexists(path):
            _replace(path, temporary)
        else:
            os.replace(temporary, path)
    fsync_path(path.parent)


@contextlib.contextmanager
def scratch_directory(path: Path) -> Iterator[Path]:
    """Yield an empty directory beside `path`, for what is to become `path`; removed when the block ends.

    Its lock tells it from the remains of killed runs, which are removed first: see `remove_stale_temporaries`.
    """
    make_directories(path.parent)
    remove_stale_temporaries(path)
    with _locked_temporary(path) as temporary:
        try:
            yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def recover_directory(path: Path) -> None:
    """Where `path` is missing because a replacement was killed between its two renames, put the old one back.

    Costs nothing where `path` exists, so readers call it before they say that something is missing. A living writer
    between its renames is waited for. Raises OSError, its `filename` the old directory, when it cannot be put back.
    """
    if os.path.lexists(path):
        return
    for old in (aside / _OLD for aside in _temporaries(path) if (aside / _OLD).exists()):
        with contextlib.suppress(FileNotFoundError), _lock(old.parent):  # not found: its writer has ended meanwhile
            if old.exists() and not os.path.lexists(path):
                _restore(old, path)


def remove_stale_temporaries(path: Path) -> None:
    """Remove what killed writers of the directory `path` left beside it; restore a replaced copy that never landed.

    A writer holds a lock (flock) on its temporary directory that the kernel drops when it dies, so the temporaries of
    living writers stay. Such a lock is not seen from other machines: on a shared file system, one machine at a time
    may write to a name.
    """
    recover_directory(path)
    if found := _temporaries(path):
        fsync_path(path.parent)  # a rename that made `path` may be on its way to the disk, and what it replaced is there till then
    for stale in found:
        with contextlib.suppress(FileNotFoundError, BlockingIOError), _lock(stale, fcntl.LOCK_NB):
            if os.path.lexists(path) or not (stale / _OLD).exists():
                _discard(stale)


@contextlib.contextmanager
def directory_lock(path: Path, *, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold the directory `path` alone while the block runs; `waiting` is called once if another process has it first.

    The kernel drops the lock when its holder dies. It is not seen from other machines.
    """
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(_lock(path, fcntl.LOCK_NB))
        except BlockingIOError:
            waiting()
            held.enter_context(_lock(path))
        yield


@contextlib.contextmanager
def try_directory_lock(path: Path) -> Iterator[bool]:
    """Hold the directory `path` alone while the block runs, or give False at once where another process has it."""
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(_lock(path, fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def _check_free(path: Path, replace: bool, marker: str | None) -> None:
    if not os.path.lexists(path):
        return
    if not replace:
        raise FileExistsError(f"{path} exists already")
    if marker is None or (path / marker).is_file():
        return
    if not path.is_dir():
        raise FileExistsError(f"{path} is not a directory, so it is not replaced; choose another name, or remove it yourself")
    if any(path.iterdir()):
        raise FileExistsError(
            f"{path} holds files but no {marker}, so it is something else and not replaced; choose another name, or remove it yourself"
        )


def _replace(path: Path, new: Path) -> None:
    with _locked_temporary(path) as aside:
        old = aside / _OLD
        fsync_path(path.parent)  # else a power cut could lose `aside`, and with it what is about to be moved there
        try:
            os.replace(path, old)
            os.replace(new, path)
            fsync_path(path.parent)
        finally:
            if os.path.lexists(old) and not os.path.lexists(path):
                _restore(old, path)
            _discard(aside)  # not reached where the old one could not be put back


def _restore(old: Path, path: Path) -> None:
    """Put it back, on the disk too before this returns: what held it is about to be removed."""
    os.replace(old, path)
    fsync_path(path.parent)


def _discard(temporary: Path) -> None:
    """Remove it. What was replaced first loses the name by which it would be restored: a kill or a power cut may leave half of it."""
    with contextlib.suppress(OSError):
        os.replace(temporary / _OLD, temporary / _GONE)
    with contextlib.suppress(OSError):
        if os.path.lexists(temporary / _GONE):  # perhaps since a writer that was killed just now
            fsync_path(temporary)
    shutil.rmtree(temporary, ignore_errors=True)


def _temporaries(path: Path) -> list[Path]:
    """The temporary directories of `path` and of no other name: a name may hold dots, and what is special in a glob."""
    pattern = re.compile(re.escape(f"{TEMPORARY_PREFIX}{path.name}.") + "[a-z0-9_]{8}")  # earlier versions had more letters
    try:
        found = [entry for entry in path.parent.iterdir() if pattern.fullmatch(entry.name)]
    except (FileNotFoundError, NotADirectoryError, PermissionError):  # no folder, or one that hides what is in it
        return []
    # What another user made and keeps to himself is not ours to look after.
    return [entry for entry in found if entry.is_dir() and not entry.is_symlink() and os.access(entry, os.R_OK | os.X_OK)]


@contextlib.contextmanager
def _locked_temporary(path: Path) -> Iterator[Path]:
    """A new temporary directory of `path`, locked while the block runs."""
    while True:
        temporary = path.parent / f"{TEMPORARY_PREFIX}{path.name}.{secrets.token_hex(4)}"
        temporary.mkdir()
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(temporary, os.O_RDONLY)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if temporary.exists():
                break
            os.close(descriptor)
        # Before it was locked, another writer took it for the remains of a killed run.
    try:
        yield temporary
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _lock(directory: Path, flags: int = 0) -> Iterator[None]:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | flags)
        yield
    finally:
        os.close(descriptor)
