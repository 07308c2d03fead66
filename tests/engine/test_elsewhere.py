"""`dqe-search` over a sharded folder, shards on Ray and Milvus, by INDEX alone. `dqe-serve`: server/test_elsewhere_served.py."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dqe_engine.cli import index as index_command
from dqe_engine.cli import search as search_command
from dqe_engine.errors import DQEError
from dqe_engine.index import GalleryIndex, on_ray_shards
from dqe_engine.index.elsewhere import is_elsewhere, open_elsewhere
from dqe_engine.index.shard_files import cut_index
from dqe_engine.index.sharded import ShardedIndex


@pytest.fixture
def indexed(bundle_path: Path, image_folder: Path, tmp_path: Path) -> Iterator[GalleryIndex]:
    options = ["--out", str(tmp_path / "index"), "--provider", "cpu", "--threads", "1"]
    assert index_command.main([str(bundle_path), str(image_folder), *options]) == 0
    with GalleryIndex.load(tmp_path / "index") as index:
        yield index


@pytest.fixture
def shards(indexed: GalleryIndex, tmp_path: Path) -> Path:
    cut_index(indexed, tmp_path / "shards", 2)
    return tmp_path / "shards"


def found(bundle: Path, index: Path, capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    capsys.readouterr()
    arguments = [str(bundle), str(index), "--text", "in red", "--json", "--provider", "cpu", "--threads", "1", *options]
    assert search_command.main(arguments) == 0, capsys.readouterr().err
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    return {name: answer[name] for name in ("hits", "exact", "lost")}


def described(path: Path, **places: Any) -> Path:
    path.write_text(json.dumps({"kind": "index-elsewhere", "schema_version": 1, **places}))
    return path


def test_a_sharded_folder_is_searched_as_the_index(
    bundle_path: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    single = found(bundle_path, tmp_path / "index", capsys)
    assert len(single["hits"]) > 2
    assert found(bundle_path, shards, capsys) == single
    monkeypatch.chdir(tmp_path)
    assert found(bundle_path, Path("shards"), capsys) == single
    first, second = (hit["id"] for hit in single["hits"][:2])
    assert found(bundle_path, shards, capsys, "--exclude", first)["hits"][0]["id"] == second


def test_shards_on_ray_are_opened_as_the_file_says(
    bundle_path: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray itself runs in test_sharded_ray.py."""
    asked: list[tuple[Path, dict[str, Any]]] = []

    def open_on_ray(path: Path, **options: Any) -> ShardedIndex:
        asked.append((path, options))
        return ShardedIndex.open_here(path, on_loss=options["on_loss"], timeout=options["timeout"])

    monkeypatch.setattr(on_ray_shards, "open_on_ray", open_on_ray)
    place = described(tmp_path / "shop.json", shards={"path": "shards", "on_loss": "partial", "timeout": 7.5, "name": "shop"})
    single = found(bundle_path, tmp_path / "index", capsys)
    assert found(bundle_path, place, capsys) == single
    assert asked == [(shards, {"on_loss": "partial", "timeout": 7.5, "threads": 1, "name": "shop", "spare": False})]
    lost = sorted(folder for folder in shards.iterdir() if folder.is_dir())[1]
    shutil.rmtree(lost)
    with pytest.raises(DQEError, match=lost.name):
        open_elsewhere(shards)
    partial = found(bundle_path, place, capsys)
    assert (partial["exact"], partial["lost"]) == (False, [lost.name])
    assert search_command.main([str(bundle_path), str(place), "--text", "in red", "--provider", "cpu", "--threads", "1"]) == 0
    assert f"these shards gave no answer, so their items are missing: {lost.name}" in capsys.readouterr().out


def test_milvus_is_searched_as_the_index(
    bundle_path: Path, indexed: GalleryIndex, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pymilvus", reason="pymilvus is not installed: pip install 'dqe-engine[milvus]'")
    pytest.importorskip("milvus_lite", reason="milvus-lite is not installed: pip install 'dqe-engine[milvus]'")
    from milvus_lite.server_manager import server_manager_instance

    from dqe_engine.index.milvus import MilvusIndex

    MilvusIndex.create(str(tmp_path / "garments.db"), "garments", indexed).close()
    place = described(tmp_path / "shop.json", milvus={"uri": "garments.db", "collection": "garments"})
    try:
        here, there = found(bundle_path, tmp_path / "index", capsys), found(bundle_path, place, capsys)
    finally:
        server_manager_instance.release_all()
    assert [hit["id"] for hit in there["hits"]] == [hit["id"] for hit in here["hits"]]
    assert (there["exact"], there["lost"]) == (True, [])


@pytest.mark.parametrize(
    ("places", "told"),
    [
        ({}, "expected either shards or milvus"),
        ({"shards": {"path": "a"}, "milvus": {"uri": "b", "collection": "c"}}, "expected either shards or milvus"),
        ({"shards": {"path": "a", "replicas": 2}}, "valid keys of ShardsPlace: path, on_loss"),
        ({"shards": {"path": "a", "on_loss": "ignore"}}, "valid values: error, partial"),
        ({"shards": {"path": "nowhere"}}, "no sharded index here (shards.json is missing)"),
        ({"milvus": {"uri": "nowhere.db", "collection": "c"}}, "nowhere.db; name Milvus Lite's file, or a server as http://"),
        ({"kind": "gallery-index"}, "this is an index, not a file that says where an index is"),
    ],
)
def test_what_a_file_gets_wrong_is_one_line(
    places: dict[str, Any], told: str, bundle_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = described(tmp_path / "shop.json", **places)
    assert search_command.main([str(bundle_path), str(place), "--text", "in red", "--provider", "cpu"]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
    assert list(tmp_path.glob("*.db")) == [], "a search writes nothing"


def test_what_is_checked_is_a_single_index(bundle_path: Path, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert search_command.main([str(bundle_path), str(shards), "--text", "in red", "--provider", "cpu", "--no-verify"]) == 2
    assert capsys.readouterr().err.startswith(f"error: --no-verify: {shards} is sharded or in Milvus")


def test_the_folder_of_an_index_is_none_of_these(indexed: GalleryIndex, tmp_path: Path) -> None:
    assert not is_elsewhere(tmp_path / "index")
    assert not is_elsewhere(tmp_path / "nothing")
