"""Adding images to a feature cache: one writer at a time, shard by shard, nothing encoded twice."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dqe_engine.contracts.parsing import to_json
from dqe_engine.errors import InputError
from dqe_engine.files import atomic_directory, describe_write_error, directory_lock, sha256_of
from dqe_engine.image_sources import decode_ahead
from dqe_engine.processors import available_cpus

from ..data.damage import require_readable
from ..encoding import ENCODE_BATCH, Listener, encode_pixels
from ..model import DQEModel
from .identity import digest_images
from .store import SHARD_FILE, TOKENS_FILE, FeatureStore, ShardRecord, StoredTokens, spell_bytes

_SHARD_BYTES = 256 << 20
_SHARD_SECONDS = 60.0  # a kill loses at most one shard: where a tower is slow, shards are small
_MARGIN = 64 << 20  # bytes that are left free on the disk


def cached_tokens(
    root: Path, model: DQEModel, images: Path, names: Sequence[str], *, listener: Listener = lambda event: None
) -> StoredTokens:
    """The tokens of the images `names` under `images` from the cache at `root`, which is filled with those it lacks."""
    return fill(FeatureStore(root, model), model, images, names, digest_images(images, names), listener=listener)


def fill(
    store: FeatureStore,
    model: DQEModel,
    images: Path,
    names: Sequence[str],
    digests: Sequence[str],
    *,
    listener: Listener = lambda event: None,
) -> StoredTokens:
    """Encode what `store` lacks of the images `names` (with the SHA-256 `digests`), and return the tokens of all.

    May be killed at any moment and called by several processes: finished shards stay, and one process writes while the
    others wait and then take over what it has written. Says the size beforehand (event "features"). Raises InputError
    when the disk is too small, or for an image that cannot be read.
    """
    if any(digest not in store for digest in digests):
        waiting = {"event": "features", "text": f"waiting for another process that writes to {store.directory}"}
        with directory_lock(store.directory, waiting=lambda: listener(waiting)):
            store.refresh()  # it may have written what is missing here
            _fill(store, model, images, {d: n for n, d in zip(names, digests, strict=True) if d not in store}, len(digests), listener)
    return StoredTokens(store, digests)


def _fill(store: FeatureStore, model: DQEModel, images: Path, missing: dict[str, str], wanted: int, listener: Listener) -> None:
    """`missing`: image names by SHA-256, in the order in which they are encoded."""
    if not missing:
        return
    require_readable(images, list(missing.values()))
    need, free = len(missing) * store.row_bytes, shutil.disk_usage(store.directory).free
    size = store.describe(len(missing))
    if need + _MARGIN > free:
        raise InputError(f"{store.directory}: {size} to write, {spell_bytes(free)} free; free space, or choose another folder")
    listener({"event": "features", "text": f"{store.directory}: {size} to write, {wanted - len(missing):,} of {wanted:,} images are there"})
    batches = _encoded(model, images, missing)
    precision = str(next(model.vision_model.parameters()).dtype).removeprefix("torch.")
    done, number = 0, 1 + max((int(name.removeprefix("shard-")) for name in store.shards), default=-1)
    while done < len(missing):
        try:
            with atomic_directory(store.directory / f"shard-{number:05d}") as shard:
                for count in _write_shard(shard, batches, precision):
                    done += count
                    listener({"event": "encode", "done": done, "total": len(missing)})
        except OSError as error:
            raise InputError(f"{describe_write_error(error, store.directory)}; finished shards stay") from error
        store.refresh()
        number += 1


def _write_shard(shard: Path, batches: Iterator[tuple[list[str], NDArray[np.float16]]], precision: str) -> Iterator[int]:
    """Fill the folder `shard` from `batches` until it is large or old enough; yields the images of each batch written."""
    digest, written, started = hashlib.sha256(), 0, time.monotonic()
    held: list[str] = []
    # Written as it comes, not through a mapping: where the disk is full, that is an error and not a SIGBUS.
    with open(shard / TOKENS_FILE, "wb") as stream:
        for names, tokens in batches:
            stream.write(tokens.data)
            digest.update(tokens.data)
            held += names
            written += tokens.nbytes
            yield len(names)
            if written >= _SHARD_BYTES or time.monotonic() - started >= _SHARD_SECONDS:
                break
    (shard / SHARD_FILE).write_bytes(to_json(ShardRecord(images=tuple(held), sha256=digest.hexdigest(), precision=precision)))


def _encoded(model: DQEModel, images: Path, missing: dict[str, str]) -> Iterator[tuple[list[str], NDArray[np.float16]]]:
    """Batches of SHA-256 and tokens (B, P, Hv) float16, decoded ahead by threads."""
    pairs = [(digest, images / name) for digest, name in missing.items()]
    decoded = decode_ahead(pairs, model.config.preprocessing, ahead=2 * ENCODE_BATCH, threads=available_cpus())
    held: list[tuple[str, NDArray[np.uint8]]] = []
    for position, (digest, pixels) in enumerate(decoded, start=1):
        if isinstance(pixels, InputError):
            raise pixels
        if sha256_of(path := images / missing[digest]) != digest:  # hours may lie between
            raise InputError(f"{path}: changed since its bytes were read first; run again when nothing writes to this folder")
        held.append((digest, pixels))
        if len(held) == ENCODE_BATCH or position == len(pairs):
            tokens = encode_pixels(model, np.stack([p for _, p in held])).to(torch.float16).cpu().numpy()
            yield [d for d, _ in held], np.ascontiguousarray(tokens.astype("<f2", copy=False))
            held = []
