"""What tests keep for later runs: found again for the same key alone, whole or not at all, and not for ever."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support import shared as module
from support.shared import digest_of, kept


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("DQE_TESTS_KEEP", raising=False)
    monkeypatch.setattr(module, "_KEPT", tmp_path / "kept")
    return tmp_path / "kept"


def test_a_key_is_made_once_and_another_by_itself(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    for key in ("a", "a", "b"):
        path = kept(tmp_path_factory, "thing", key, lambda out, key=key: out.open("x").write(key))
        assert path.read_text() == key


def test_what_failed_is_made_again(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    def fail(out: Path) -> None:
        out.mkdir()
        (out / "half").touch()
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        kept(tmp_path_factory, "thing", "a", fail)
    assert list(kept(tmp_path_factory, "thing", "a", Path.mkdir).iterdir()) == []


def test_what_nobody_asked_for_in_a_while_is_removed(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    old, used = (kept(tmp_path_factory, "thing", key, Path.touch) for key in ("old", "used"))
    for path in (old, used):
        os.utime(path.parent / "done", (0, 0))
    kept(tmp_path_factory, "thing", "used", Path.touch)
    kept(tmp_path_factory, "thing", "new", Path.touch)
    assert (old.exists(), used.exists()) == (False, True)
    assert kept(tmp_path_factory, "thing", "old", Path.touch).exists()


def test_a_run_may_make_everything_itself(cache: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DQE_TESTS_KEEP", "0")
    path = kept(tmp_path_factory, "only here", "a", Path.touch)
    assert path.exists()
    assert not cache.exists()


def test_digests_tell_parts_and_files_apart(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("b")
    digests = {digest_of("a", "b"), digest_of("ab"), digest_of("b", "a"), digest_of("a", files=[file]), digest_of()}
    assert len(digests) == 4  # a file counts as its text
    file.write_text("c")
    assert digest_of("a", files=[file]) not in digests
