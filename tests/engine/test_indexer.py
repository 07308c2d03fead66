"""What becomes of images and metadata that are new, changed or gone, by the API and by the commands on an index."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.samples import noise_image

from dqe_engine.engine import RetrievalEngine
from dqe_engine.errors import InputError
from dqe_engine.image_policy import ImagePolicy
from dqe_engine.index import GalleryIndex
from dqe_engine.indexer import Indexer
from dqe_engine.results import IndexingReport, SkippedImage


def without_hashes(path: Path) -> None:
    """Make an index what it would be had it been made before content was recorded."""
    index = GalleryIndex.load(path)
    index._writer._table.contents[:] = [None] * len(index._writer._table)
    index.save(path.with_name("old"))
    shutil.rmtree(path)
    path.with_name("old").rename(path)


# -- the API ---------------------------------------------------------------------------------------------------------------


def test_a_replaced_photo_is_embedded_anew_and_keeps_its_metadata(engine: RetrievalEngine, image_folder: Path) -> None:
    engine.index_images(image_folder, metadata={"00.png": {"brand": "x"}, "02.png": {"brand": "y"}})
    before = {id: engine.index.target_tokens(id) for id in engine.index.ids}
    noise_image(100).save(image_folder / "00.png")
    noise_image(102).save(image_folder / "02.png")
    report = engine.index_images(image_folder, metadata={"02.png": {"brand": "z"}})
    assert report.changed == ("00.png", "02.png")
    assert set(report.unchanged) == set(before) - {"00.png", "02.png"}
    assert report.added == report.described == report.unrecorded == report.skipped == ()
    assert [item.metadata for item in engine.index.get(["00.png", "02.png"])] == [{"brand": "x"}, {"brand": "z"}]
    np.testing.assert_array_equal(engine.index.target_tokens("00.png"), engine.encode_images([noise_image(100)]).target_tokens[0])
    for id in report.unchanged:
        np.testing.assert_array_equal(engine.index.target_tokens(id), before[id])


def test_what_is_the_same_is_not_embedded(engine: RetrievalEngine, image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images: dict[str, Any] = {"file": image_folder / "00.png", "bytes": (image_folder / "02.png").read_bytes(), "memory": noise_image(1)}
    engine.index_images(images)
    monkeypatch.setattr(Indexer, "_add_batch", lambda *_: pytest.fail("embedded"))
    shutil.copy(image_folder / "00.png", image_folder / "copy.png")  # another file, and date, of the same bytes
    report = engine.index_images(images | {"file": image_folder / "copy.png", "bytes": image_folder / "02.png"})
    assert report == IndexingReport(unchanged=("file", "bytes", "memory"))
    monkeypatch.undo()
    assert engine.index_images({"memory": noise_image(2)}).changed == ("memory",)


def test_metadata_alone(engine: RetrievalEngine, image_folder: Path) -> None:
    engine.index_images({"a": noise_image(1), "b": noise_image(2)}, metadata={"a": {"n": 1}})
    tokens, content = engine.index.target_tokens("a"), engine.index.get(["a"])[0].content
    report = engine.index_images({"b": noise_image(2)}, metadata={"a": {"n": 2}, "b": {}})
    assert (report.described, report.unchanged) == (("a",), ("b",))
    (item,) = engine.index.get(["a"])
    assert item.metadata == {"n": 2}
    assert item.content == content is not None
    np.testing.assert_array_equal(engine.index.target_tokens("a"), tokens)
    with pytest.raises(InputError, match="metadata for 2 ids that neither the images nor the index have: 'x', 'y'; correct them"):
        engine.index_images({"c": noise_image(3)}, metadata={"x": {}, "y": {}, "a": {}})
    assert "c" not in engine.index
    engine.index_images({"c": noise_image(3)}, metadata={"x": {}, "c": {"n": 3}}, ignore_unknown=True)
    assert engine.index.get(["c"])[0].metadata == {"n": 3}


def test_add_only_changes_nothing(engine: RetrievalEngine) -> None:
    engine.index_images({"a": noise_image(1)}, metadata={"a": {"n": 1}})
    before = engine.index.snapshot()
    for images, metadata in (({"a": noise_image(2), "b": noise_image(3)}, {}), ({"b": noise_image(3)}, {"a": {"n": 2}})):
        with pytest.raises(InputError, match=r"images differ .* under the same ids.*: 'a'; .*leave out add_only"):
            engine.index_images(images, metadata=metadata, add_only=True)
        assert engine.index.snapshot() is before
    report = engine.index_images({"a": noise_image(1), "b": noise_image(3)}, metadata={"a": {"n": 1}}, add_only=True)
    assert (report.added, report.unchanged) == (("b",), ("a",))


def test_rows_without_a_hash(engine: RetrievalEngine, image_folder: Path, tmp_path: Path) -> None:
    engine.index_images(image_folder)
    engine.save_index(tmp_path / "index")
    without_hashes(tmp_path / "index")
    assert b"content" not in next((tmp_path / "index").glob("*.catalogue")).read_bytes()
    engine.load_index(tmp_path / "index", verify=True)
    noise_image(100).save(image_folder / "00.png")
    report = engine.index_images(image_folder)
    assert report.unchanged == report.unrecorded == tuple(sorted(engine.index.ids))
    assert "12 unchanged (of which 12 were indexed before content was recorded and not compared)" in report.describe()
    assert len(engine.index_images(image_folder, rehash=True).changed) == 12
    assert engine.index_images(image_folder).unrecorded == ()
    np.testing.assert_array_equal(engine.index.target_tokens("00.png"), engine.encode_images([noise_image(100)]).target_tokens[0])


def test_hashes_survive_saves_compaction_refreshes_and_restarts(engine: RetrievalEngine, image_folder: Path, tmp_path: Path) -> None:
    engine.index_images(image_folder, metadata={"00.png": {"n": 1}})
    expected = {item.id: item.content for item in engine.index}
    assert len(set(expected.values())) == 12
    engine.save_index(tmp_path / "index")
    reader = GalleryIndex.load(tmp_path / "index")
    engine.index.update_metadata({"02.png": {"n": 2}})
    engine.index.remove(["00.png"])
    del expected["00.png"]
    engine.save_index(tmp_path / "index")
    assert reader.refresh()
    engine.index.compact()
    for found in (engine.index, reader, GalleryIndex.load(tmp_path / "index", verify=True)):
        assert {item.id: item.content for item in found} == expected


def test_a_damaged_replacement_leaves_the_item(engine: RetrievalEngine, image_folder: Path) -> None:
    engine.index_images(image_folder, metadata={"00.png": {"n": 1}})
    before = engine.index.target_tokens("00.png")
    (image_folder / "00.png").write_bytes((image_folder / "02.png").read_bytes()[:70])
    with pytest.raises(InputError, match=r"00\.png: damaged"):
        engine.index_images(image_folder)
    report = engine.index_images(image_folder, on_error="skip")
    assert ([image.id for image in report.skipped], report.changed) == (["00.png"], ())
    np.testing.assert_array_equal(engine.index.target_tokens("00.png"), before)


def test_a_file_over_the_policys_limit_is_not_read(engine: RetrievalEngine, bundle_path: Path, image_folder: Path) -> None:
    """Not even to be compared: hashing it would say that it is unchanged."""
    engine.index_images(image_folder)
    strict = RetrievalEngine.load(bundle_path, provider="cpu", threads=1, images=ImagePolicy(max_bytes=100))
    strict.attach(engine.index)
    report = strict.index_images(image_folder, on_error="skip")
    assert {image.kind for image in report.skipped} == {"over a limit"}
    assert (len(report.skipped), report.changed, len(engine.index)) == (12, (), 12)


def test_a_file_that_changes_while_it_is_read_is_found_at_the_next_run(
    engine: RetrievalEngine, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dqe_engine import indexer as module

    opened = module.open_image

    def overwritten(source: Any, *arguments: Any) -> Any:
        if source == image_folder / "00.png":
            noise_image(100).save(source)
        return opened(source, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module, "open_image", overwritten)
        engine.index_images(image_folder)
    assert engine.index_images(image_folder).changed == ("00.png",)


def test_contents_that_are_no_hashes(engine: RetrievalEngine) -> None:
    encoded = engine.encode_images([noise_image(1)])
    for contents, said in (([1], "ASCII strings"), (["é"], "ASCII strings"), ([None, None], "2 content hashes for 1 ids")):
        with pytest.raises(InputError, match=said):
            engine.index.add(["a"], encoded.target_tokens, encoded.image_tokens, contents=contents)
    assert len(engine.index) == 0


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("a.png: not an image of an accepted format; save it as JPEG", "not an image"),
        ("a.png: not an image that Pillow can read", "not an image"),
        ("a.png: damaged or truncated image (x)", "damaged"),
        ("a.png: 5 bytes, more than the limit of 4; compress it", "over a limit"),
        ("a.png: no such image file", "gone meanwhile"),
        ("a.png: permission denied; grant", "permission denied"),
        ("id 'x' is not valid Unicode (lone surrogates); rename the item", "with an id that is not Unicode"),
        ("a.png: input/output error", "not readable"),
    ],
)
def test_kinds_of_reasons(reason: str, kind: str) -> None:
    assert SkippedImage("a.png", reason).kind == kind


# -- metadata files --------------------------------------------------------------------------------------------------------


# -- an index alone --------------------------------------------------------------------------------------------------------
