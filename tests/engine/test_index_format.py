"""The page on the format is enough to read an index: its reader, as it stands there, sees what `GalleryIndex` sees."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.samples import image_rows, target_rows

from dqe_engine.index import GalleryIndex
from dqe_engine.index.storage import SCHEMA_VERSION, IndexManifest

PAGE = (Path(__file__).parents[2] / "docs" / "index.md").read_text()


@pytest.fixture
def read_index() -> Callable[[Path], list[Any]]:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(code, "docs/index.md", "exec"), names)
    return names["read_index"]


@pytest.mark.parametrize(("storage", "image_storage"), [("f32", "f16"), ("f16", "f32"), ("f32", "none")])
def test_another_reader_sees_the_same(
    storage: str, image_storage: str, make_index: Callable[..., GalleryIndex], read_index: Callable[[Path], list[Any]], tmp_path: Path
) -> None:
    index = make_index(0, storage=storage, image_storage=image_storage)

    def add(ids: list[str], seed: int, **options: Any) -> None:
        images = None if image_storage == "none" else image_rows(len(ids) + seed)[seed:]
        index.add(ids, target_rows(len(ids) + seed)[seed:], images, replace=True, **options)

    def check() -> None:
        found = read_index(tmp_path / "index")
        assert [row[:3] for row in found] == [tuple(item) for item in index]
        for id, _, _, targets, images in found:
            np.testing.assert_array_equal(targets.astype(np.float32), index.target_tokens(id))
            assert (images is None) == (image_storage == "none")
            if images is not None:
                np.testing.assert_array_equal(images.astype(np.float32), index.image_tokens(id))

    index.save(tmp_path / "index")
    check()
    add([f"i{n}" for n in range(8)], 0, metadata=[{"n": n, "name": "é\n"} if n % 2 else None for n in range(8)], contents=["0" * 32] * 8)
    index.save(tmp_path / "index")
    check()
    add(["i3", "new"], 20)  # replaced: i3 is another row, and has neither metadata nor content
    index.remove(["i0"])
    index.update_metadata({"i5": {"n": 50}})
    index.save(tmp_path / "index")
    check()
    for file in (tmp_path / "index").glob("*.*[!n]"):
        with open(file, "ab") as stream:
            stream.write(b"what a killed save left")
    check()
    index.compact()
    check()
    assert index.ids == ("i1", "i2", "i4", "i6", "i7", "i3", "new", "i5")


def test_the_reader_refuses_damage(
    make_index: Callable[..., GalleryIndex], read_index: Callable[[Path], list[Any]], tmp_path: Path
) -> None:
    make_index(3, image_storage="f16").save(tmp_path / "index")
    for file in [path for path in (tmp_path / "index").iterdir() if path.name not in ("lock", "manifest.json")]:
        good = file.read_bytes()
        file.write_bytes(bytes([good[0] ^ 1]) + good[1:])
        with pytest.raises(ValueError, match="damaged"):
            read_index(tmp_path / "index")
        file.write_bytes(good[:-1])
        with pytest.raises(ValueError, match="damaged"):
            read_index(tmp_path / "index")
        file.write_bytes(good)
    assert len(read_index(tmp_path / "index")) == 3


def test_the_page_has_every_key(make_index: Callable[..., GalleryIndex], tmp_path: Path) -> None:
    make_index(1).save(tmp_path / "index")
    table = PAGE.partition("**manifest.json**")[2].partition("**The catalogue**")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert {key for row in rows for key in re.findall(r"`(\w+)`", row)} == set(
        json.loads((tmp_path / "index" / "manifest.json").read_bytes())
    )
    assert f"| `schema_version` | {SCHEMA_VERSION}." in table
    assert set(IndexManifest.__struct_fields__) == {key for row in rows for key in re.findall(r"`(\w+)`", row)}
