"""Feature extraction beyond one machine: Ray workers write shards of an index, and one process merges them in order.

A shard is an index of its own under a name made of what is in it, whole or absent, so that a run that was interrupted goes on
with those that are there. Workers and the merging process must see bundle, images and shards under the same paths.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from .contracts.parsing import Contract, parse_json, to_json
from .engine import RetrievalEngine
from .errors import BackendError, DQEError, IndexFormatError, InputError
from .files import atomic_directory
from .index import GalleryIndex, ImageStorage, Storage
from .index.ray_cluster import connect
from .indexer import metadata_for
from .results import SkippedImage

RECORD_FILE = "shard.json"


class ShardJob(Contract, frozen=True):
    """What a worker does with one shard: (id, absolute path, `file_stamp`) of images, in order, and how."""

    images: tuple[tuple[str, str, str], ...]
    storage: Storage
    image_storage: ImageStorage
    batch_size: int
    skip_bad: bool

    def name(self, model_hash: str) -> str:
        return "shard-" + hashlib.sha256(model_hash.encode() + to_json(self)).hexdigest()[:24]


def file_stamp(path: str) -> str:
    """What a file has that another under its name has not: size and time of change. Part of a shard's name, so that shards which were made
    of images that were replaced since are not gone on with."""
    try:
        found = os.stat(path)
    except OSError:
        return "absent"
    return f"{found.st_size} {found.st_mtime_ns}"


class ShardRecord(Contract, frozen=True):
    """`shard.json`: which images could not be read, and why, as (id, reason)."""

    skipped: tuple[tuple[str, str], ...]


class ShardEncoder:
    """A worker: it loads the bundle once, and then turns jobs into shards under `shards`."""

    def __init__(self, bundle: str, shards: str, provider: Any, threads: int | None) -> None:
        self._engine = RetrievalEngine.load(bundle, provider=provider, threads=threads)
        self._shards = Path(shards)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """`row` holds a `ShardJob` in JSON as `job`; returned is how many images it has, and an `error` that ends the work."""
        job = msgspec.json.decode(row["job"], type=ShardJob)
        try:
            self.encode(job)
        except DQEError as error:
            return {"images": 0, "error": str(error)}
        return {"images": len(job.images), "error": ""}

    def encode(self, job: ShardJob) -> None:
        """Write the job's shard. Raises InputError for an image that cannot be read, unless bad ones are skipped."""
        with atomic_directory(self._shards / job.name(self._engine.bundle.model_hash), replace=True, marker=RECORD_FILE) as new:
            self._engine.new_index(storage=job.storage, image_storage=job.image_storage)
            images = {id: Path(path) for id, path, _ in job.images}
            report = self._engine.index_images(images, batch_size=job.batch_size, on_error="skip" if job.skip_bad else "raise")
            self._engine.save_index(new)
            (new / RECORD_FILE).write_bytes(to_json(ShardRecord(tuple((s.id, s.reason) for s in report.skipped))))


def encode_shards(
    bundle: Path, jobs: Sequence[ShardJob], shards: Path, *, workers: int, provider: str, threads: int | None, done: Callable[[int], None]
) -> None:
    """Have `workers` of the Ray cluster (that of RAY_ADDRESS, else one started here) make what is missing of the jobs' shards
    under `shards`. `done` is called with the number of images of each shard that is there.

    Raises BackendError where Ray is not installed or fails, and the first worker's InputError.
    """
    model_hash = RetrievalEngine.load(bundle, provider="cpu", threads=1).bundle.model_hash
    missing = []
    for job in jobs:
        if (shards / job.name(model_hash) / RECORD_FILE).is_file():
            done(len(job.images))
        else:
            missing.append({"job": to_json(job).decode()})
    if not missing:
        return
    ray = _import_ray()
    gpus = 1 if provider == "cuda" or (provider == "auto" and ray.cluster_resources().get("GPU", 0) >= 1) else 0
    try:
        rows = ray.data.from_items(missing, override_num_blocks=len(missing)).map(
            ShardEncoder,
            fn_constructor_args=(str(bundle.absolute()), str(shards.absolute()), provider, threads),
            compute=ray.data.ActorPoolStrategy(size=min(workers, len(missing))),
            num_cpus=threads or 1,
            num_gpus=gpus,
        )
        for row in rows.iter_rows():
            if row["error"]:
                raise InputError(row["error"])
            done(int(row["images"]))
    except ray.exceptions.RayError as error:
        reason = " ".join(str(error).split())
        raise BackendError(
            f"a Ray worker failed ({reason[-300:]}); finished shards stay in {shards}, run the same command to go on"
        ) from error


def merge_shards(
    index: GalleryIndex, jobs: Sequence[ShardJob], shards: Path, place: Path, metadata: Mapping[str, Mapping[str, Any] | None]
) -> list[SkippedImage]:
    """Add the jobs' shards to `index` in order, saving to `place` after each, and remove `shards`. Images that were skipped.

    Items that are there are replaced and keep their metadata, where `metadata` has none for them.
    """
    skipped = []
    for job in jobs:
        path = shards / job.name(index.model_hash)
        if not (path / RECORD_FILE).is_file():
            raise IndexFormatError(
                f"{path}: no such file on this machine; put images, bundle and --out where all workers reach them by the same paths"
            )
        shard = GalleryIndex.load(path, model_hash=index.model_hash, verify=True)
        record = parse_json(ShardRecord, (path / RECORD_FILE).read_bytes(), where=str(path / RECORD_FILE), error=IndexFormatError)
        skipped += [SkippedImage(id, reason) for id, reason in record.skipped]
        if ids := shard.ids:
            images = None if shard.image_storage == "none" else np.stack([shard.image_tokens(id) for id in ids])
            index.add(
                ids,
                np.stack([shard.target_tokens(id) for id in ids]),
                images,
                metadata_for(index, ids, metadata),
                contents=[item.content for item in shard.get(ids)],
                replace=True,
            )
            index.save(place)
    shutil.rmtree(shards, ignore_errors=True)
    return skipped


def _import_ray() -> Any:
    """Ray, started or connected to. Raises BackendError."""
    connect("--ray", remedy=", or leave the option out")
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False  # the command shows its own
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    return ray
