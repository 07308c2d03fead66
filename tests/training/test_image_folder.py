"""Images by id, wherever they lie under a folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from dqe_engine.errors import InputError
from dqe_training.data.image_folder import ImageFolder


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return root


def test_every_format_and_depth_is_found(tmp_path: Path) -> None:
    folder = ImageFolder.scan(touch(tmp_path, "a.jpg", "x/b.JPEG", "x/y/c.png", "d.WebP", "notes.txt", ".e.png", "x/f.gif"))
    assert folder.names == {"a": "a.jpg", "b": "x/b.JPEG", "c": "x/y/c.png", "d": "d.WebP"}
    assert len(folder) == 4
    assert "a" in folder
    assert folder.missing(["c", "z", "a", "z", "q"]) == ("z", "q")


def test_a_name_may_hold_dots(tmp_path: Path) -> None:
    assert ImageFolder.scan(touch(tmp_path, "v1.2.png", "v1.3.png")).names == {"v1.2": "v1.2.png", "v1.3": "v1.3.png"}


@pytest.mark.parametrize("other", ["a.png", "x/a.jpg", "x/a.JPG"])
def test_two_different_files_of_one_id_are_both_named(tmp_path: Path, other: str) -> None:
    touch(tmp_path, "a.jpg", other)
    (tmp_path / other).write_bytes(b"other")
    with pytest.raises(InputError, match=r"two different images have the id 'a'") as caught:
        ImageFolder.scan(tmp_path)
    assert "a.jpg" in str(caught.value)
    assert other in str(caught.value)


def test_copies_of_one_image_count_as_one(tmp_path: Path) -> None:
    """FashionIQ in a folder per category: an image of two categories lies in both."""
    touch(tmp_path, "shirt/a.jpg", "toptee/a.jpg", "toptee/b.jpg")
    assert ImageFolder.scan(tmp_path).names == {"a": "shirt/a.jpg", "b": "toptee/b.jpg"}
    (tmp_path / "toptee" / "a.jpg").write_bytes(b"\0")
    with pytest.raises(InputError, match=r"shirt/a\.jpg and toptee/a\.jpg"):
        ImageFolder.scan(tmp_path)


def test_links_to_folders_are_followed_and_circles_end(tmp_path: Path) -> None:
    touch(tmp_path / "elsewhere", "a.png")
    root = touch(tmp_path / "root", "b.png")
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "circle").symlink_to(root)
    assert ImageFolder.scan(root).names == {"a": "linked/a.png", "b": "b.png"}


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none: no such image folder"):
        ImageFolder.scan(tmp_path / "none")
    assert len(ImageFolder.scan(tmp_path)) == 0
