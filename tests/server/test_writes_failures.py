"""Disks that fail or are full, folders without permission, indexes of others: a change fails in one line, and the next one goes through."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.hostile_images import encoded
from support.permissions import enforced_permissions
from support.samples import noise_image
from support.writing import png, there, uploads

from dqe_engine.engine import RetrievalEngine
from dqe_engine.errors import IndexConflictError, IndexFormatError
from dqe_engine.index import GalleryIndex
from dqe_engine.server.photos import Photos, UploadError, content_of
from dqe_engine.server.writes import Writes


def test_others_may_write_meanwhile(writes: Writes, index_path: Path, engine: RetrievalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that does not know of our lock, `dqe-index` say, comes between the reading and the save."""
    writes.add("a", png(1)).result(60)
    save, foreign = GalleryIndex.save, 0

    def after_another(index: GalleryIndex, *arguments: Any, **options: Any) -> None:
        nonlocal foreign
        if foreign < most:
            foreign += 1
            other = GalleryIndex.load(index_path)
            encoded_images = engine.encode_images([noise_image(foreign)])
            other.add([f"foreign{foreign}"], encoded_images.target_tokens, encoded_images.image_tokens, replace=True)
            save(other, index_path)
        save(index, *arguments, **options)

    monkeypatch.setattr(GalleryIndex, "save", after_another)
    most = 1
    writes.add("b", png(2)).result(60)
    assert list(there(index_path)) == ["a", "foreign1", "b"]
    foreign, most = 0, 2
    with pytest.raises(IndexConflictError, match="was changed by another writer"):
        writes.add("c", png(2)).result(60)
    assert list(there(index_path)) == ["a", "b", "foreign1", "foreign2"]
    writes.add("c", png(2)).result(60)
    assert "c" in there(index_path)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_failing_disk_fails_its_group_and_no_other(
    index_path: Path, engine: RetrievalEngine, photos: Photos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Whichever call fails, and whether it fails once or from then on."""
    writes, count, failing, on = Writes(index_path, engine, photos), 0, 0, False
    names = ("fsync", "replace", "open")

    def mortal(call: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            if threading.current_thread() is threading.main_thread() or not failing:
                return call(*arguments, **options)
            count += 1
            if count == failing or (on and count > failing):
                raise OSError(number, os.strerror(number), None)
            return call(*arguments, **options)

        return counting

    for name in names:
        monkeypatch.setattr(os, name, mortal(getattr(os, name)))
    failures, total = 0, 0
    for on in (False, True):
        for attempt in range(1, 200):
            before = there(index_path)
            count, failing = 0, attempt
            futures = [writes.add(f"{on}{attempt}", png(attempt)), *([writes.remove(next(iter(before)))] if before else [])]
            outcomes = [future.exception(60) for future in futures]
            reached, failing = count >= attempt, 0
            total += 1
            after = there(index_path)
            if any(outcomes):
                failures += 1
                assert all(isinstance(outcome, IndexFormatError | UploadError | None) for outcome in outcomes), outcomes
                assert all("\n" not in str(outcome) for outcome in outcomes)
            for future, outcome in zip(futures, outcomes, strict=True):
                if outcome is None:
                    assert (future.result().id in after) == (future is futures[0])
            writes.add("next", png(500 + attempt), replace=True).result(60)
            found = there(index_path)
            assert found["next"][1] == content_of(png(500 + attempt))
            assert {content for _, content in found.values()} <= uploads(tmp_path)
            if not reached:
                break
        assert not reached
    assert failures > total // 2
    writes.close()
    print(f"{failures} of {total} groups failed")


def test_a_disk_that_is_full(index_path: Path, engine: RetrievalEngine, photos: Photos) -> None:
    """As the kernel has it: a limit of file sizes."""
    writes, limits = Writes(index_path, engine, photos), resource.getrlimit(resource.RLIMIT_FSIZE)
    writes.add("a", png(1)).result(60)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400, limits[1]))
    try:
        with pytest.raises(IndexFormatError, match=r"cannot be written \(File too large\); raise the limit") as failure:
            writes.update("a", {"text": "x" * 1000}).result(60)
        assert isinstance(failure.value.__cause__, OSError)
        noise = encoded(Image.effect_noise((40, 40), 50), "PNG")
        with pytest.raises(UploadError, match=r"cannot be written \(File too large\)"):
            writes.add("b", noise).result(60)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(there(index_path)) == ["a"]
    writes.add("b", png(2)).result(60)
    assert list(there(index_path)) == ["a", "b"]
    writes.close()


def test_what_is_no_index_is_told_in_one_line(engine: RetrievalEngine, tmp_path: Path) -> None:
    for folder in ("gone", "empty", "file"):
        place = tmp_path / folder
        {"empty": place.mkdir, "file": place.touch}.get(folder, lambda: None)()
        writes = Writes(place, engine)
        with pytest.raises(IndexFormatError, match="no index here"):
            writes.remove("a").result(60)
        writes.close()


def test_a_folder_without_permission_is_told_in_one_line(engine: RetrievalEngine, index_path: Path) -> None:
    for mode in (0o500, 0o000):
        index_path.chmod(mode)
        with enforced_permissions():
            writes = Writes(index_path, engine)
            try:
                with pytest.raises(IndexFormatError, match="ermission denied"):
                    writes.add("a", png(1)).result(60)
            finally:
                index_path.chmod(0o700)
            writes.close()


def test_an_index_of_another_model_is_refused(writes: Writes, index_path: Path, make_foreign: Callable[[Path], None]) -> None:
    writes.add("a", png(1)).result(60)
    aside = index_path.rename(index_path.with_name("aside"))
    make_foreign(index_path)
    for _ in range(2):
        with pytest.raises(IndexFormatError, match="was made with model"):
            writes.add("b", png(2)).result(60)
    shutil.rmtree(index_path)
    with pytest.raises(IndexFormatError, match="no index here"):
        writes.add("b", png(2)).result(60)
    aside.rename(index_path)
    writes.add("b", png(2)).result(60)
    assert list(there(index_path)) == ["a", "b"]


@pytest.fixture
def make_foreign() -> Callable[[Path], None]:
    def make(path: Path) -> None:
        GalleryIndex(model_hash="m" * 32, target_shape=(3, 8), image_shape=(16, 12), image_storage="f16").save(path)

    return make
