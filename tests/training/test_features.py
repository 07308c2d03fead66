"""The feature cache: the same numbers with it as without, whole at any moment, one copy whoever writes, damage told."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from support.feature_workers import BATCH, SHARD_ROWS
from support.fork_server import ForkServer
from support.full_disk import files_of_at_most
from support.refused import refused as refused_as
from support.samples import noise_image
from support.tiny_blip2 import write_blip2
from support.tiny_training import flip_byte, make_model, model_config

from dqe_engine.contracts.preprocessing import PreprocessingSpec
from dqe_engine.errors import CheckpointError, InputError
from dqe_training.data.images import load_pixels
from dqe_training.encoding import ENCODE_BATCH, encode_image_tokens, encode_pixels
from dqe_training.features import FeatureStore, StoredTokens, cached_tokens, writing
from dqe_training.features import store as store_module
from dqe_training.features.identity import digest_images, feature_key
from dqe_training.features.store import META_FILE, SHARD_FILE, TOKENS_FILE, row_bytes, spell_bytes
from dqe_training.run import workflow
from dqe_training.run.workflow import DataSource, build_model

COUNT = 23
NAMES = [f"{seed:02}.png" for seed in range(COUNT)]
Event = dict[str, Any]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for seed, name in enumerate(NAMES):
        noise_image(seed).save(folder / name)
    return folder


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two batches of seven to a shard."""
    monkeypatch.setattr(writing, "ENCODE_BATCH", BATCH)
    monkeypatch.setattr(writing, "_SHARD_BYTES", SHARD_ROWS * row_bytes(make_model()))


def expected(images: Path, names: list[str]) -> torch.Tensor:
    model = make_model()
    return encode_image_tokens(model, load_pixels(images, names, model.config.preprocessing))


def everything(tokens: StoredTokens) -> torch.Tensor:
    return tokens[torch.arange(len(tokens))]


def fill(cache: Path, images: Path, names: list[str] = NAMES, events: list[Event] | None = None) -> StoredTokens:
    return cached_tokens(cache, make_model(), images, names, listener=lambda event: None if events is None else events.append(event))


def only_store(cache: Path) -> Path:
    (store,) = (path for path in cache.iterdir() if path.is_dir())
    return store


def assert_sound(cache: Path) -> FeatureStore:
    """Every shard verifies, and no image is there twice."""
    store = FeatureStore(cache, make_model())
    store.verify()
    records = [json.loads((store.directory / name / SHARD_FILE).read_text())["images"] for name in store.shards]
    assert Counter(digest for record in records for digest in record).most_common(1)[0][1] == 1
    return store


# -- what is in it -----------------------------------------------------------------------------------------------------------


def test_tokens_are_those_of_the_tower(images: Path, tmp_path: Path, small: None) -> None:
    tokens = fill(tmp_path, images)
    assert torch.equal(everything(tokens), expected(images, NAMES))
    assert everything(tokens).dtype == torch.float16
    rows = torch.tensor([22, 0, 22, 13, 14])
    assert torch.equal(tokens[rows], expected(images, NAMES)[rows])
    assert [len(json.loads(path.read_text())["images"]) for path in sorted(tmp_path.glob(f"*/shard-*/{SHARD_FILE}"))] == [14, 9]


def test_nothing_is_encoded_twice_and_new_images_are_added(
    images: Path, tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    encode = writing.encode_pixels
    monkeypatch.setattr(writing, "encode_pixels", lambda model, pixels: encoded.append(len(pixels)) or encode(model, pixels))
    fill(tmp_path, images, NAMES[:10])
    fill(tmp_path, images, NAMES[:10])
    assert encoded == [7, 3]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    tokens = fill(tmp_path, images, NAMES[::-1])
    assert encoded == [7, 3, 7, 6]
    assert {path: path.read_bytes() for path in before} == before
    assert torch.equal(everything(tokens), expected(images, NAMES[::-1]))
    assert_sound(tmp_path)


def test_images_are_known_by_their_bytes(images: Path, tmp_path: Path, small: None) -> None:
    """A copy under another name costs nothing; another picture under a known name is another image."""
    fill(tmp_path / "cache", images)
    moved = tmp_path / "moved"
    moved.mkdir()
    shutil.copy(images / "03.png", moved / "a.png")
    shutil.copy(images / "03.png", moved / "b.png")
    shutil.copy(images / "04.png", moved / "03.png")
    events: list[Event] = []
    tokens = everything(fill(tmp_path / "cache", moved, ["a.png", "b.png", "03.png"], events))
    assert events == []
    assert torch.equal(tokens, everything(fill(tmp_path / "cache", images))[[3, 3, 4]])
    noise_image(99).save(moved / "03.png")
    assert not torch.equal(everything(fill(tmp_path / "cache", moved, ["03.png"]))[0], tokens[2])


def test_the_size_is_said_beforehand(images: Path, tmp_path: Path, small: None) -> None:
    fill(tmp_path, images, NAMES[:3])
    events: list[Event] = []
    fill(tmp_path, images, NAMES, events)
    assert events[0]["event"] == "features"
    assert "20 images × 5 × 16 × 2 B = 3.2 kB to write, 3 of 23 images are there" in events[0]["text"]
    assert [(e["done"], e["total"]) for e in events[1:]] == [(7, 20), (14, 20), (20, 20)]


def test_tokens_do_not_depend_on_the_other_images(images: Path) -> None:
    """Nor on how many there are: one image in a batch of its own is what it is among others."""
    model = make_model()
    pixels = load_pixels(images, NAMES, model.config.preprocessing)
    seen: list[torch.Size] = []
    encode = model.encode_images
    model.encode_images = lambda values: seen.append(values.shape) or encode(values)
    together = encode_pixels(model, pixels)
    for rows in ([0], [22], [5, 3, 11], list(range(22, -1, -1))):
        assert torch.equal(encode_pixels(model, pixels[rows]), together[rows])
    assert set(seen) == {(ENCODE_BATCH, 3, 16, 16)}


@pytest.mark.parametrize(("count", "spelled"), [(0, "0 B"), (999, "999 B"), (11_300_000_000, "11.3 GB"), (1.2e12, "1.2 TB")])
def test_sizes_are_spelled(count: float, spelled: str) -> None:
    assert spell_bytes(count) == spelled


def test_a_store_per_tower_and_preprocessing(images: Path, tmp_path: Path) -> None:
    model = make_model()
    other = make_model(seed=1)
    padded = make_model(msgspec.structs.replace(model_config(), preprocessing=PreprocessingSpec(image_size=16, fit="target_pad")))
    wider = make_model(model_config(hidden_size=32))
    wider.vision_model.load_state_dict(model.vision_model.state_dict())
    keys = [feature_key(m) for m in (model, other, padded)]
    assert len(set(keys)) == 3
    assert feature_key(wider) == keys[0]  # the Q-Former has no part in it
    moved = make_model()
    with torch.no_grad():
        moved.vision_model.post_layernorm.bias[0] += 0.01
    assert feature_key(moved) != keys[0]
    moved.load_state_dict(model.state_dict())
    assert feature_key(moved) == keys[0]
    half = make_model()
    half.vision_model.half()
    assert feature_key(half) == keys[0]  # held in half precision while frozen
    for m in (model, other):
        cached_tokens(tmp_path, m, images, NAMES[:4])
    assert {path.name for path in tmp_path.iterdir()} == set(keys[:2])
    assert not torch.equal(*(everything(cached_tokens(tmp_path, m, images, NAMES[:4])) for m in (model, other)))


def test_a_slow_tower_writes_small_shards(images: Path, tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "_SHARD_SECONDS", 0.0)
    fill(tmp_path, images)
    assert len(assert_sound(tmp_path).shards) == 4  # one a batch


def test_more_shards_than_may_be_mapped(images: Path, tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "_SHARD_SECONDS", 0.0)
    monkeypatch.setattr(store_module, "_OPEN_SHARDS", 1)
    rows = torch.randint(COUNT, (60,))
    assert torch.equal(fill(tmp_path, images)[rows], expected(images, NAMES)[rows])


# -- killed, and several at once -----------------------------------------------------------------------------------------------


@pytest.fixture
def server(torch_workers: ForkServer) -> ForkServer:
    return torch_workers


@pytest.mark.slow
def test_a_kill_at_any_change_of_the_disk_loses_at_most_a_shard(server: ForkServer, images: Path, tmp_path: Path) -> None:
    arguments = {"images": str(images)}
    assert server.run("fill", cache=str(tmp_path / "straight"), **arguments) == 0
    whole = everything(fill(tmp_path / "straight", images))
    moment, held = 0, []
    while True:
        moment += 1
        cache = tmp_path / f"killed-{moment}"
        if server.run("fill_and_die", cache=str(cache), die_before=moment, **arguments) != signal.SIGKILL:
            break
        held.append(len(FeatureStore(cache, make_model())))
        assert held[-1] in (0, SHARD_ROWS, COUNT)
        # Killed once more in what follows, at a moment that differs from case to case, and then left to end.
        server.run("fill_and_die", cache=str(cache), die_before=1 + moment % 5, **arguments)
        assert len(FeatureStore(cache, make_model())) >= held[-1]
        assert server.run("fill", cache=str(cache), **arguments) == 0
        assert torch.equal(everything(fill(cache, images)), whole)
        assert_sound(cache)
        assert not list(cache.glob("*/.tmp-shard*"))
    assert moment > 12
    assert set(held) == {0, SHARD_ROWS, COUNT}


def test_several_writers_at_once_make_one_copy(server: ForkServer, images: Path, tmp_path: Path) -> None:
    assert server.run("fill_at_once", cache=str(tmp_path), images=str(images), writers=4) == 0
    store = assert_sound(tmp_path)
    assert len(store) == COUNT
    assert torch.equal(everything(fill(tmp_path, images)), expected(images, NAMES))


def test_who_has_to_wait_is_told_and_takes_over(images: Path, tmp_path: Path, small: None) -> None:
    """Another process holds the cache, and ends after the first shard."""
    fill(tmp_path, images, NAMES[:1])
    store = only_store(tmp_path)
    descriptor = os.open(store, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    events: list[Event] = []

    def listen(event: Event) -> None:
        events.append(event)
        if "waiting" in event.get("text", ""):
            os.close(descriptor)

    cached_tokens(tmp_path, make_model(), images, NAMES, listener=listen)
    assert "waiting for another process" in events[0]["text"]
    assert len(assert_sound(tmp_path)) == COUNT


def test_a_full_cache_needs_no_lock(images: Path, tmp_path: Path, small: None) -> None:
    """Readers do not wait for whoever adds other images."""
    fill(tmp_path, images)
    descriptor = os.open(only_store(tmp_path), os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    fill(tmp_path, images)
    os.close(descriptor)


# -- damage ----------------------------------------------------------------------------------------------------------------------


refused = partial(refused_as, kind=CheckpointError)


def test_damage_is_told_with_the_remedy(images: Path, tmp_path: Path, small: None) -> None:
    fill(tmp_path, images)
    shard = sorted(only_store(tmp_path).glob("shard-*"))[1]
    whole = (shard / TOKENS_FILE).read_bytes()
    flip_byte(shard / TOKENS_FILE)
    tokens = fill(tmp_path, images)
    tokens[torch.arange(SHARD_ROWS)]  # the other shard is fine
    refused(lambda: everything(tokens), str(shard), "SHA-256 differs", "remove")
    refused(lambda: FeatureStore(tmp_path, make_model()).verify(), "SHA-256 differs")
    (shard / TOKENS_FILE).write_bytes(whole[:-1])
    refused(lambda: fill(tmp_path, images), f"{len(whole) - 1} bytes, expected {len(whole)}", "remove")
    (shard / TOKENS_FILE).write_bytes(whole)
    record = (shard / SHARD_FILE).read_bytes()
    for content in (b"{", record.replace(b"sha256", b"sha512")):
        (shard / SHARD_FILE).write_bytes(content)
        refused(lambda: fill(tmp_path, images), SHARD_FILE)
    (shard / SHARD_FILE).unlink()
    refused(lambda: fill(tmp_path, images), SHARD_FILE, "missing")
    shutil.rmtree(shard)  # the remedy
    assert torch.equal(everything(fill(tmp_path, images)), expected(images, NAMES))


def test_a_store_of_something_else(images: Path, tmp_path: Path) -> None:
    fill(tmp_path, images, NAMES[:2])
    meta = only_store(tmp_path) / META_FILE
    content = json.loads(meta.read_text())
    meta.write_text(json.dumps(content | {"schema_version": 9, "news": 1}))
    refused(lambda: fill(tmp_path, images), "schema version 9", "upgrade")
    first = {key: value for key, value in content.items() if key != "kind"} | {"schema_version": 1}
    meta.write_text(json.dumps(first))  # as it was written before `kind`
    assert len(fill(tmp_path, images, NAMES[:2])) == 2
    assert json.loads(meta.read_text()) == first
    meta.write_text(json.dumps(content | {"kind": "bundle"}))
    refused(lambda: fill(tmp_path, images), "this is a bundle, not a feature cache")
    meta.write_text(json.dumps(content | {"width": 17}))
    refused(lambda: fill(tmp_path, images), "another vision tower")
    meta.write_text("")
    refused(lambda: fill(tmp_path, images), META_FILE)


def test_a_disk_that_is_too_small(images: Path, tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda path: SimpleNamespace(free=(64 << 20) + 3679))
    refused(lambda: fill(tmp_path, images), "23 images × 5 × 16 × 2 B = 3.68 kB to write", "67.1 MB free", kind=InputError)
    assert not list(tmp_path.glob("*/shard-*"))
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda path: SimpleNamespace(free=(64 << 20) + 3680))
    fill(tmp_path, images)


def test_a_disk_that_fills_up_keeps_finished_shards(images: Path, tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "_SHARD_SECONDS", 0.0)
    fill(tmp_path, images, NAMES[:7])
    monkeypatch.setattr(writing, "_SHARD_SECONDS", 60.0)
    with files_of_at_most(1200):
        refused(lambda: fill(tmp_path, images), "cannot be written", "finished shards stay", kind=InputError)
    assert len(FeatureStore(tmp_path, make_model())) == 7
    assert torch.equal(everything(fill(tmp_path, images))[:7], expected(images, NAMES)[:7])


def test_an_image_that_cannot_be_read(images: Path, tmp_path: Path, small: None) -> None:
    folder = shutil.copytree(images, tmp_path / "images")
    whole = (folder / "17.png").read_bytes()
    (folder / "17.png").write_bytes(whole[:50])
    (folder / "21.png").write_bytes(b"")
    refused(lambda: fill(tmp_path / "cache", folder), "2 of 23 images cannot be read: 17.png", "21.png (empty)", kind=InputError)
    assert not list((tmp_path / "cache").glob("*/shard-*")), "that is told before the work"
    shutil.copy(images / "21.png", folder)
    middle = whole.index(b"IDAT") + 40
    (folder / "17.png").write_bytes(whole[:middle] + bytes(4) + whole[middle + 4 :])  # what only decoding finds ends the work
    refused(lambda: fill(tmp_path / "cache", folder), "17.png", kind=InputError)
    assert len(FeatureStore(tmp_path / "cache", make_model())) == SHARD_ROWS
    refused(lambda: fill(tmp_path / "cache", folder, [*NAMES, "x.png"]), "1 of 24 images are missing: x.png", kind=InputError)


def test_an_image_that_changes_meanwhile(images: Path, tmp_path: Path, small: None) -> None:
    folder = shutil.copytree(images, tmp_path / "images")
    digests = digest_images(folder, NAMES)
    noise_image(77).save(folder / "16.png")
    store, model = FeatureStore(tmp_path / "cache", make_model()), make_model()
    refused(lambda: writing.fill(store, model, folder, NAMES, digests), "16.png", "changed", kind=InputError)
    assert len(FeatureStore(tmp_path / "cache", model)) == SHARD_ROWS


def test_images_that_are_not_there(images: Path, tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, make_model())
    refused(lambda: StoredTokens(store, digest_images(images, NAMES)), "23 of 23 images are not in this cache", kind=InputError)


def test_half_precision_is_recorded(garments: Path, images: Path, tmp_path: Path) -> None:
    write_blip2(tmp_path / "blip2")
    config = workflow.load_config("blip2", [f"backbone={tmp_path / 'blip2'}", "optim.vision_precision=float16"])
    cached_tokens(tmp_path / "cache", build_model(config, DataSource.from_directory(garments).read_vocabulary(), 0), images, NAMES)
    (record,) = (tmp_path / "cache").glob(f"*/shard-*/{SHARD_FILE}")
    assert json.loads(record.read_text())["precision"] == "float16"
