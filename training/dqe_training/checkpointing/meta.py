"""What a checkpoint says of itself, `checkpoint.json`, read without PyTorch."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, Literal

from dqe_engine.contracts.manifest import FileEntry
from dqe_engine.contracts.parsing import Contract
from dqe_engine.contracts.provenance import Provenance
from dqe_engine.contracts.tokenizer import TokenizerSpec
from dqe_engine.contracts.versioned import Versioned, read_document
from dqe_engine.contracts.zones import ZoneSpec
from dqe_engine.errors import CheckpointError
from dqe_engine.files import recover_directory, sha256_of

from ..config.schema import TrainConfig

SCHEMA_VERSION, OLDEST_RESUMED = 6, 4
"""Checkpoints of earlier schemas are read; runs are resumed from `OLDEST_RESUMED` on. 1: without backbones. 2: without `start`. 3:
"quantile" bounds, and no validation. 4: without `kind`. 5: without imported models, their towers and `captions`."""
META = "checkpoint.json"
WEIGHTS, VOCABULARY = "model.safetensors", "vocabulary.json"

UNCALIBRATED_ZONES = ZoneSpec(lo=0.05, hi=0.2, policy="hardest")
"""What a checkpoint of unfinished training says; `Trainer` reads better ones off the training set at the end."""


class Validated(Contract, frozen=True):
    """What a validation found after `step` steps: `figures` in [0, 1] by name, and the name of the one that tells which model is best.
    `split`: identity of the queries; figures of two are not comparable."""

    step: int
    split: str
    headline: str
    figures: dict[str, float]

    @property
    def value(self) -> float:
        return self.figures[self.headline]


class Progress(Contract, frozen=True):
    """Where training stands. `step_in_epoch` batches of `epoch` are done; `seconds` is time spent training, validation left out.

    `validated`: the last validation; `best`: the one of the best model so far, the earliest of equals. None before the first.
    """

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    seconds: float = 0.0
    finished: bool = False
    validated: Validated | None = None
    best: Validated | None = None


class CheckpointMeta(Versioned, frozen=True, kw_only=True):
    """`start_hash`: SHA-256 of the weights file that training began with, where it began with a checkpoint (`config.start`).
    `imported`: where the weights, or those that training began with, come from, if not from training here."""

    kind: Literal["training-checkpoint"] = "training-checkpoint"
    schema_version: int = SCHEMA_VERSION
    config: TrainConfig
    tokenizer: TokenizerSpec
    data_hash: str
    progress: Progress
    serving_zones: ZoneSpec
    files: tuple[FileEntry, ...]
    start_hash: str = ""
    imported: Provenance | None = None

    @classmethod
    def upgraded(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Zones by rank were called "quantile" up to schema 3: a config that is refused that word now, but a checkpoint was trained with
        them, whatever they are called."""
        with contextlib.suppress(KeyError, TypeError):  # what is wrong with `data` is for strict parsing to say
            zones = data["config"]["trns"]["zones"]
            if data["schema_version"] <= 3 and zones["bounds"] == "quantile":
                zones["bounds"] = "rank"
        return data

    def file(self, name: str) -> FileEntry:
        """The entry of a file that every checkpoint has."""
        return next(entry for entry in self.files if entry.path == name)


def parse_meta(directory: Path) -> CheckpointMeta:
    """What a checkpoint directory says of itself; its files are not looked at. Raises CheckpointError."""
    path = directory / META
    try:
        recover_directory(directory)
    except OSError as error:
        raise CheckpointError(
            f"{directory}: its replacement was interrupted, and the old one is at {error.filename}; rename that to {directory.name}"
        ) from error
    try:
        meta = read_document(CheckpointMeta, path, remedy="restore it or train again", error=CheckpointError)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(f"{directory}: not a checkpoint (no {META}); give a directory that dqe-train wrote") from error
    listed = {entry.path for entry in meta.files}
    for needed in (WEIGHTS, VOCABULARY, meta.tokenizer.file):
        if needed not in listed:
            raise CheckpointError(f"{path}: {needed} is not in the list of files, so it cannot be verified; train again")
    return meta


def read_meta(directory: Path) -> CheckpointMeta:
    """Parse and verify a checkpoint directory: every file present, of the recorded size and SHA-256. Raises CheckpointError."""
    meta = parse_meta(directory)
    for entry in meta.files:
        verify_file(directory, entry)
    return meta


def verify_file(directory: Path, entry: FileEntry) -> Path:
    """The path of one of a checkpoint's files, of the recorded size and SHA-256. Raises CheckpointError."""
    file = directory / entry.path
    if not file.is_file():
        raise CheckpointError(f"{file}: missing from the checkpoint; restore it or train again")
    if file.stat().st_size != entry.size or sha256_of(file) != entry.sha256:
        raise CheckpointError(f"{file}: damaged (size or SHA-256 differs from {META}); restore it or train again")
    return file
