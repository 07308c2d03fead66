"""`dqe-index --ray` on a local cluster of two workers: the index of the plain path, resumed and merged in order."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.samples import noise_image

from dqe_engine.cli import index as index_command
from dqe_engine.engine import RetrievalEngine
from dqe_engine.index import GalleryIndex
from dqe_engine.ray_indexing import RECORD_FILE, ShardEncoder, ShardJob, encode_shards, file_stamp, merge_shards


def index(bundle: Path, images: Path, out: Path, *options: str) -> int:
    sizes = ("--batch-size", "2", "--save-every", "4", "--provider", "cpu", "--threads", "1")
    return index_command.main([str(bundle), str(images), "--out", str(out), *sizes, *options])


def assert_same_index(a: Path, b: Path) -> None:
    first, second = (GalleryIndex.load(path, verify=True) for path in (a, b))
    assert first.ids == second.ids
    assert (first.storage, first.image_storage) == (second.storage, second.image_storage)
    for id in first.ids:
        np.testing.assert_array_equal(first.target_tokens(id), second.target_tokens(id))
        assert first.get([id])[0].content == second.get([id])[0].content is not None
        if first.image_storage != "none":
            np.testing.assert_array_equal(first.image_tokens(id), second.image_tokens(id))


# -- without Ray -----------------------------------------------------------------------------------------------------------


def jobs_of(images: Path, *, size: int, skip_bad: bool = False) -> list[ShardJob]:
    files = sorted(images.rglob("*.png"))
    found = [(path.relative_to(images).as_posix(), str(path), file_stamp(str(path))) for path in files]
    return [
        ShardJob(images=tuple(found[start : start + size]), storage="f32", image_storage="f16", batch_size=2, skip_bad=skip_bad)
        for start in range(0, len(found), size)
    ]


@pytest.fixture
def encoder(bundle_path: Path, tmp_path: Path) -> ShardEncoder:
    return ShardEncoder(str(bundle_path), str(tmp_path / "shards"), "cpu", 1)


def test_shards_merge_into_the_plain_index(bundle_path: Path, image_folder: Path, tmp_path: Path, encoder: ShardEncoder) -> None:
    assert index(bundle_path, image_folder, tmp_path / "plain") == 0
    jobs = jobs_of(image_folder, size=4)
    for job in reversed(jobs):  # whichever worker is first
        encoder.encode(job)
    engine = RetrievalEngine.load(bundle_path, provider="cpu")
    engine.new_index()
    assert merge_shards(engine.index, jobs, tmp_path / "shards", tmp_path / "merged", {}) == []
    assert_same_index(tmp_path / "merged", tmp_path / "plain")
    assert not (tmp_path / "shards").exists()


def test_a_shards_name_says_what_is_in_it(image_folder: Path) -> None:
    jobs = jobs_of(image_folder, size=4)
    names = {job.name("a") for job in jobs} | {jobs[0].name("b")} | {job.name("a") for job in jobs_of(image_folder, size=4, skip_bad=True)}
    assert len(names) == 2 * len(jobs) + 1


def test_shards_of_images_that_were_replaced_since_are_not_gone_on_with(
    bundle_path: Path, image_folder: Path, tmp_path: Path, encoder: ShardEncoder
) -> None:
    """And what is replaced in the index keeps its metadata."""
    engine = RetrievalEngine.load(bundle_path, provider="cpu", threads=1)
    engine.index_images(image_folder, metadata={"00.png": {"n": 1}, "02.png": {"n": 2}})
    for job in jobs_of(image_folder, size=12):
        encoder.encode(job)
    noise_image(100).save(image_folder / "00.png")
    jobs = jobs_of(image_folder, size=12)
    assert not (tmp_path / "shards" / jobs[0].name(engine.bundle.model_hash)).exists()
    for job in jobs:
        encoder.encode(job)
    merge_shards(engine.index, jobs, tmp_path / "shards", tmp_path / "merged", {"02.png": {"n": 3}})
    np.testing.assert_array_equal(engine.index.target_tokens("00.png"), engine.encode_images([noise_image(100)]).target_tokens[0])
    assert [item.metadata for item in engine.index.get(["00.png", "02.png"])] == [{"n": 1}, {"n": 3}]
    assert engine.index_images(image_folder).changed == ()


def test_nothing_is_asked_of_ray_where_all_shards_are_there(
    bundle_path: Path, image_folder: Path, tmp_path: Path, encoder: ShardEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = jobs_of(image_folder, size=5)
    for job in jobs:
        encoder.encode(job)
    monkeypatch.setattr("dqe_engine.ray_indexing._import_ray", lambda: pytest.fail("Ray was started"))
    seen: list[int] = []
    encode_shards(bundle_path, jobs, tmp_path / "shards", workers=2, provider="cpu", threads=1, done=seen.append)
    assert seen == [len(job.images) for job in jobs]


def test_ray_that_is_not_installed(
    bundle_path: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name.partition(".")[0] == "ray":
            raise ImportError(name)
        return plain(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    assert index(bundle_path, image_folder, tmp_path / "out", "--ray") == 2
    assert capsys.readouterr().err == "error: --ray: Ray is not installed; pip install 'dqe-engine[ray]', or leave the option out\n"
    assert index(bundle_path, image_folder, tmp_path / "out", "--ray-workers", "3") == 2
    assert "--ray-workers 3 has no effect without --ray" in capsys.readouterr().err


# -- on a cluster ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_two_workers_make_the_plain_index(
    bundle_path: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, out = tmp_path / "plain", tmp_path / "ray"
    assert index(bundle_path, image_folder, plain) == 0
    bad = image_folder / "sub" / "05.png"
    content = bad.read_bytes()
    bad.write_bytes(b"broken")
    assert index(bundle_path, image_folder, out, "--ray") == 2
    said = capsys.readouterr().err
    assert [line for line in said.splitlines() if line.startswith("error: ")] == [said.splitlines()[-1]]
    assert "05.png" in said.splitlines()[-1]
    assert len(GalleryIndex.load(out)) == 0
    bad.write_bytes(content)
    assert index(bundle_path, image_folder, out, "--ray") == 0
    assert "12 added" in capsys.readouterr().out
    assert_same_index(out, plain)
    assert not out.with_name("ray.shards").exists()
    assert index(bundle_path, image_folder, out, "--ray") == 0
    assert "0 added, 0 changed, 0 with other metadata, 12 unchanged" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_workers_skip_what_the_plain_path_skips(
    bundle_path: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (image_folder / "sub" / "05.png").write_bytes(b"broken")
    for name, options in (("plain", ()), ("ray", ("--ray", "--ray-workers", "1"))):
        assert index(bundle_path, image_folder, tmp_path / name, "--skip-bad", "--image-tokens", "none", "--storage", "f16", *options) == 0
        captured = capsys.readouterr()
        assert "11 added" in captured.out
        assert "3 skipped (3 not an image)" in captured.out
        assert "05.png: not an image" in captured.err
    assert_same_index(tmp_path / "ray", tmp_path / "plain")
    assert not list(tmp_path.glob(f"*/{RECORD_FILE}"))
