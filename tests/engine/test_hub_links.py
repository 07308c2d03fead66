"""Links of the hub client's cache: which are followed, and that what they lead to is verified. No client and no hub is needed."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import onnx
import pytest
from support.refused import refused as refused_as
from support.samples import noise_image
from support.tiny_bundle import write_manifest

from dqe_engine.bundle import Bundle
from dqe_engine.contracts.graphs import GRAPHS
from dqe_engine.engine import RetrievalEngine
from dqe_engine.errors import BundleError
from dqe_engine.hub_paths import Snapshot

FILES = sorted(["manifest.json", "tokenizer.json", *(spec.file for spec in GRAPHS)])
LAST = len(FILES) - 1
NAME = "me/tiny"


refused = partial(refused_as, kind=BundleError)


@pytest.fixture
def cached(bundle_path: Path, tmp_path: Path) -> Path:
    """A snapshot as the client lays it out, made by hand, to bend its links."""
    repository = tmp_path / "hub" / "models--me--tiny"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for n, name in enumerate(FILES):
        shutil.copy(bundle_path / name, repository / "blobs" / f"{n:064}")
        (snapshot / name).symlink_to(f"../../blobs/{n:064}")
    return snapshot


def bend(snapshot: Path, target: str | Path) -> None:
    link = snapshot / FILES[-1]
    link.unlink()
    link.symlink_to(target)


def test_the_caches_links_are_inside(cached: Path, tmp_path: Path) -> None:
    assert Bundle.load(cached).origin == f"hf://{NAME}@{'a' * 40}"
    (tmp_path / "named").symlink_to(cached)
    assert Bundle.load(tmp_path / "named").origin == f"hf://{NAME}@{'a' * 40}"
    # Repositories of one cache share what both have: a blob is then a link itself.
    blob, stored = cached.parents[1] / "blobs" / f"{LAST:064}", cached.parents[2] / "blobs" / "00" / f"{7:064}"
    stored.parent.mkdir(parents=True)
    blob.rename(stored)
    blob.symlink_to(f"../../blobs/00/{7:064}")
    assert Bundle.load(cached).sizes.attributes == 2
    stored.write_bytes(bytes(stored.stat().st_size))
    refused(lambda: Bundle.load(cached, verify=False), "its bytes changed")
    blob.unlink()
    refused(lambda: Bundle.load(cached), "missing from the bundle", f"remove {cached.parents[1]}, and load it again")


@pytest.fixture
def outside_weights(bundle_path: Path, tmp_path: Path) -> Path:
    """The tiny bundle with a graph's weights in a file of their own, as large models have them."""
    bundle = Path(shutil.copytree(bundle_path, tmp_path / "outside"))
    graph = onnx.load(bundle / "target_encoder.onnx")
    onnx.save(
        graph, bundle / "target_encoder.onnx", save_as_external_data=True, location="target_encoder.onnx.data", size_threshold=0
    )  # fmt: skip
    write_manifest(bundle)
    return bundle


@pytest.mark.parametrize("shared", [False, True], ids=["of the repository", "of the whole cache"])
def test_weights_in_a_file_of_their_own_are_read_through_the_links(outside_weights: Path, tmp_path: Path, shared: bool) -> None:
    snapshot = tmp_path / "hub" / "models--me--tiny" / "snapshots" / ("b" * 40)
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "blobs").mkdir()
    for n, file in enumerate(sorted(outside_weights.iterdir())):
        blob, stored = snapshot.parents[1] / "blobs" / f"{n:040}", tmp_path / "hub" / "blobs" / f"{n:02}" / f"{n:02}{n:062}"
        stored.parent.mkdir(parents=True)
        shutil.copy(file, stored if shared else blob)
        if shared:
            blob.symlink_to(f"../../blobs/{n:02}/{stored.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")
    engine = RetrievalEngine.load(snapshot, provider="cpu", threads=1)
    here = RetrievalEngine.load(outside_weights, provider="cpu", threads=1)
    images = [noise_image(0)]
    assert (engine.encode_images(images).target_tokens == here.encode_images(images).target_tokens).all()


def test_an_onnxruntime_that_follows_no_links(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As 1.24.1 says it."""
    loaded = Bundle.load(cached)

    def refuse(path: Path, *args: object, **options: object) -> None:
        raise BundleError(f"{path}: ONNX Runtime cannot load it: External data path validation failed for initializer: w.")

    monkeypatch.setattr("dqe_engine.bundle.OnnxSession", refuse)
    refused(
        lambda: loaded.session(loaded.manifest.graphs[0]),
        f"{loaded.origin}: the installed onnxruntime cannot read weights",
        "upgrade it",
        "cp -rL",
    )


def test_links_that_the_client_does_not_make_are_outside(cached: Path, bundle_path: Path, tmp_path: Path) -> None:
    """Each leads to the right content, so that nothing but the way is wrong."""
    repository, name = cached.parents[1], FILES[-1]
    good = bundle_path / name
    other = repository.parent / "models--you--tiny" / "blobs"
    other.mkdir(parents=True)
    shutil.copy(good, other / f"{LAST:064}")
    shutil.copy(good, repository / "refs")
    shutil.copy(good, repository / "blobs" / "plain-name")
    (repository / "blobs" / f"{98:064}").symlink_to(good)
    (repository / "blobs" / f"{99:064}").symlink_to(f"../../models--you--tiny/blobs/{LAST:064}")
    for target in (
        good, f"../../../models--you--tiny/blobs/{LAST:064}", "../../refs", "../../blobs/plain-name", f"../../blobs/{98:064}",
        f"../../blobs/{99:064}",
    ):  # fmt: skip
        bend(cached, target)
        assert (cached / name).read_bytes() == good.read_bytes()
        refused(lambda: Bundle.load(cached), f"'{name}' is outside the bundle or not a plain path; do not use this bundle")
    bend(cached, f"../../blobs/{LAST:064}")
    assert Bundle.load(cached).sizes.attributes == 2
    (repository / "blobs").rename(tmp_path / "blobs")
    (repository / "blobs").symlink_to(tmp_path / "blobs")
    refused(lambda: Bundle.load(cached), "outside the bundle")


@pytest.mark.parametrize(
    "place", ["tiny/snapshots/{}", "models--me--tiny/snapshot/{}", "models--me--tiny/snapshots/main", "models--me/snapshots/{}"]
)
def test_the_same_links_in_other_folders_are_outside(cached: Path, tmp_path: Path, place: str) -> None:
    elsewhere = tmp_path / "elsewhere" / place.format("a" * 40)
    elsewhere.parents[1].mkdir(parents=True)
    shutil.copytree(cached.parents[1] / "blobs", elsewhere.parents[1] / "blobs")
    shutil.copytree(cached, elsewhere, symlinks=True)
    assert Snapshot.at(elsewhere) is None
    refused(lambda: Bundle.load(elsewhere), "outside the bundle")
