"""Directories that are whole or absent, whatever fails, whoever else writes, and whatever they are called."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dqe_engine import files
from dqe_engine.files import (
    atomic_directory,
    describe_write_error,
    directory_lock,
    recover_directory,
    remove_stale_temporaries,
    scratch_directory,
)

NAMES = ["run", "run[1]", "run*", "run.v2", "größe "]


def make(path: Path, text: str) -> Path:
    path.mkdir(parents=True)
    (path / "content").write_text(text)
    return path


def replaced(path: Path, text: str, **options: object) -> None:
    with atomic_directory(path, replace=True, **options) as temporary:
        (temporary / "content").write_text(text)


def fail_at(monkeypatch: pytest.MonkeyPatch, call: int, error: BaseException) -> None:
    """Make the `call`-th rename raise, and only that one."""
    rename, calls = os.replace, []

    def replace(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == call:
            raise error
        rename(source, target)

    monkeypatch.setattr(files.os, "replace", replace)


@pytest.mark.parametrize("name", NAMES)
def test_replacing_leaves_nothing_else(tmp_path: Path, name: str) -> None:
    for text in ("old", "new", "newer"):
        replaced(tmp_path / name, text)
        assert (tmp_path / name / "content").read_text() == text
        assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("error", [OSError("no"), KeyboardInterrupt()])
@pytest.mark.parametrize("call", [1, 2])
def test_a_rename_that_fails_puts_the_old_one_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int, error: BaseException
) -> None:
    path = make(tmp_path / "run", "old")
    fail_at(monkeypatch, call, error)
    with pytest.raises(type(error)):
        replaced(path, "new")
    assert (path / "content").read_text() == "old"
    assert os.listdir(tmp_path) == ["run"]


@pytest.mark.parametrize("name", NAMES)
def test_an_old_one_that_was_never_replaced_is_recovered(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    old = make(tmp_path / f".tmp-{name}.a_b0c1d2" / "old", "old")
    recover_directory(path)
    assert (path / "content").read_text() == "old"
    assert not old.exists()
    make(old, "older")
    recover_directory(path)
    assert (path / "content").read_text() == "old", "a directory that is there is not touched"
    recover_directory(tmp_path / "absent" / "deeper")


def test_a_living_writer_between_its_renames_is_waited_for(tmp_path: Path) -> None:
    """A reader that comes in between gets the new directory, and does not make the writer's second rename fail."""
    path = make(tmp_path / "run", "old")
    # The process moves `run` aside, tells, and waits for a moment before it moves the new one into its place.
    code = """if True:
        import os, sys, time
        from pathlib import Path
        from dqe_engine import files
        rename = os.replace
        def replace(source, target):
            rename(source, target)
            if target.name == "old":
                print("aside", flush=True)
                time.sleep(0.5)
        files.os.replace = replace
        with files.atomic_directory(Path(sys.argv[1]), replace=True) as temporary:
            (temporary / "content").write_text("new")
    """
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "aside\n"
        assert not path.exists()
        recover_directory(path)
        assert (path / "content").read_text() == "new"
    assert writer.returncode == 0
    assert os.listdir(tmp_path) == ["run"]


@pytest.mark.parametrize("name", NAMES)
def test_living_writers_keep_their_temporaries(tmp_path: Path, name: str) -> None:
    with atomic_directory(tmp_path / name, replace=True) as first:
        (first / "content").write_text("first")
        replaced(tmp_path / name, "second")
        replaced(tmp_path / "run", "another name")
        replaced(tmp_path / f"{name}.v2", "another name")
        assert (first / "content").read_text() == "first"
    assert (tmp_path / name / "content").read_text() == "first"
    assert not [entry for entry in os.listdir(tmp_path) if entry.startswith(".tmp-")]


def test_a_killed_writers_temporary_is_removed(tmp_path: Path) -> None:
    code = """if True:
        import os, signal, sys
        from pathlib import Path
        from dqe_engine.files import atomic_directory
        with atomic_directory(Path(sys.argv[1])) as temporary:
            (temporary / "content").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "run[1]")], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(os.listdir(tmp_path)) == 1
    remove_stale_temporaries(tmp_path / "run[1]")
    assert os.listdir(tmp_path) == []


def test_only_exact_names_are_temporaries(tmp_path: Path) -> None:
    kept = {".tmp-run.v2.abcdefgh", ".tmp-run.abc", ".tmp-run.abcdefghi", ".tmp-run.ABCDEFGH", ".tmp-runs.abcdefgh", ".tmp-abcdefgh"}
    for name in kept:
        make(tmp_path / name, "another's")
    (tmp_path / ".tmp-run.filefile").write_text("a file")
    remove_stale_temporaries(tmp_path / "run")
    assert {*os.listdir(tmp_path)} == kept | {".tmp-run.filefile"}


def test_something_else_is_not_replaced(tmp_path: Path) -> None:
    photos = make(tmp_path / "photos", "precious")
    with pytest.raises(FileExistsError, match=r"photos holds files but no manifest\.json.*choose another name, or remove it yourself"):
        replaced(photos, "new", marker="manifest.json")
    (tmp_path / "file").write_text("precious")
    with pytest.raises(FileExistsError, match=r"file is not a directory.*choose another name"):
        replaced(tmp_path / "file", "new", marker="manifest.json")
    assert sorted(os.listdir(tmp_path)) == ["file", "photos"]
    assert (photos / "content").read_text() == "precious"


def test_what_a_marker_lets_pass(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path in (make(tmp_path / "made", "manifest"), tmp_path / "empty", tmp_path / "absent"):
        replaced(path, "new", marker="content")
        assert (path / "content").read_text() == "new"


@pytest.mark.parametrize("replace", [False, True])
def test_something_else_that_appears_meanwhile_is_kept(tmp_path: Path, replace: bool) -> None:
    with pytest.raises(FileExistsError), atomic_directory(tmp_path / "run", replace=replace, marker="manifest.json"):
        make(tmp_path / "run", "theirs")
    assert (tmp_path / "run" / "content").read_text() == "theirs"
    assert os.listdir(tmp_path) == ["run"]


def test_without_replace_an_existing_one_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "run", "old")
    with pytest.raises(FileExistsError, match="exists already"), atomic_directory(tmp_path / "run"):
        pass
    shutil.move(tmp_path / "run", tmp_path / ".tmp-run.abcdefgh" / "old")
    with pytest.raises(FileExistsError, match="exists already"), atomic_directory(tmp_path / "run"):
        pass


def test_everything_is_flushed_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[Path] = []
    fsync: Callable[[Path], None] = files.fsync_path
    monkeypatch.setattr(files, "fsync_path", lambda path: (flushed.append(path), fsync(path)))
    with atomic_directory(tmp_path / "run") as temporary:
        make(temporary / "sub", "text")
    assert flushed == [temporary / "sub", temporary / "sub" / "content", temporary, tmp_path]


def test_a_scratch_directory_vanishes(tmp_path: Path) -> None:
    with scratch_directory(tmp_path / "deep" / "index") as place:
        make(place / "sub", "text")
        remove_stale_temporaries(tmp_path / "deep" / "index")
        assert place.parent == tmp_path / "deep"
        assert (place / "sub").is_dir()
    assert os.listdir(tmp_path / "deep") == []


def test_a_directory_is_held_by_one_process(tmp_path: Path) -> None:
    """Another waits, is told so once, and gets it when the holder is killed."""
    code = (
        "import sys, time; from pathlib import Path; from dqe_engine.files import directory_lock\n"
        "with directory_lock(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    waited: list[bool] = []

    def waiting() -> None:
        waited.append(True)
        holder.kill()

    with directory_lock(tmp_path, waiting=waiting):
        assert waited == [True]
    holder.wait()
    holder.stdout.close()
    with directory_lock(tmp_path, waiting=waiting):
        assert waited == [True]


@pytest.mark.parametrize(
    ("file", "line"),
    [
        (None, "a/out: cannot be written (Permission denied); grant"),
        ("a/out/x.bin", "a/out: cannot be written (Permission denied); grant"),
        ("a/.tmp-out.abcdefgh/x.bin", "a/out: cannot be written (Permission denied); grant"),
        ("a/out.partial/x", "a/out: cannot be written (Permission denied); grant"),
        ("a", "a/out: cannot be written (Permission denied); grant"),
        ("a/output/x", "a/output/x: permission denied; grant"),
        ("b/read.me", "b/read.me: permission denied; grant"),
    ],
)
def test_an_error_while_writing_is_told_of_the_file_that_it_is_of(file: str | None, line: str) -> None:
    error = PermissionError(errno.EACCES, "Permission denied") if file is None else PermissionError(errno.EACCES, "Permission denied", file)
    assert describe_write_error(error, Path("a/out")).startswith(line)


def test_half_of_what_was_replaced_is_never_restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill while the old one is removed, and then someone removes the new one, too."""
    target = tmp_path / "out"
    for name in ("first", "second"):
        if name == "second":  # killed after the first file of the old one
            monkeypatch.setattr(files.shutil, "rmtree", lambda path, **_: [file.unlink() for file in path.rglob("a")])
        with atomic_directory(target, replace=True, marker="a") as temporary:
            for file in ("a", "b"):
                (temporary / file).write_text(name)
    monkeypatch.undo()
    shutil.rmtree(target)
    remove_stale_temporaries(target)
    assert list(tmp_path.iterdir()) == []
