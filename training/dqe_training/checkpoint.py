"""Checkpoints: a directory of safetensors and JSON, whole or absent, verified before use. No pickle."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from dqe_engine.bundle import build_file_entries
from dqe_engine.contracts.manifest import FileEntry
from dqe_engine.contracts.parsing import Contract, parse, parse_json, to_json
from dqe_engine.contracts.tokenizer import TokenizerSpec
from dqe_engine.contracts.vocabulary import AttributeVocabulary
from dqe_engine.contracts.zones import ZoneSpec
from dqe_engine.errors import CheckpointError, InputError
from dqe_engine.files import atomic_directory, recover_directory, remove_stale_temporaries, scratch_directory, sha256_of

from .backbone.weights import copy_weights
from .config import TrainConfig
from .model import DQEModel
from .model.adapters import plain_state

SCHEMA_VERSION = 2  # 1: without backbones; its checkpoints are read, and only its unfinished runs not resumed
_META = "checkpoint.json"


UNCALIBRATED_ZONES = ZoneSpec(lo=0.05, hi=0.2, policy="hardest")
"""What a checkpoint of unfinished training says; `Trainer` reads better ones off the training set at the end."""


class Progress(Contract, frozen=True):
    """Where training stands. `step_in_epoch` batches of `epoch` are done; `seconds` is time spent training."""

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    seconds: float = 0.0
    finished: bool = False


class CheckpointMeta(Contract, frozen=True):
    schema_version: int
    config: TrainConfig
    tokenizer: TokenizerSpec
    data_hash: str
    progress: Progress
    serving_zones: ZoneSpec
    files: tuple[FileEntry, ...]


@dataclass(frozen=True)
class Checkpoint:
    """A loaded model and what belongs to it. `state` holds optimiser tensors where they were saved."""

    model: DQEModel
    tokenizer: Tokenizer
    meta: CheckpointMeta
    directory: Path

    @property
    def vocabulary(self) -> AttributeVocabulary:
        return self.model.vocabulary


def save_checkpoint(
    directory: Path,
    model: DQEModel,
    tokenizer: Tokenizer,
    *,
    config: TrainConfig,
    progress: Progress,
    data_hash: str = "",
    serving_zones: ZoneSpec = UNCALIBRATED_ZONES,
    state: dict[str, Tensor] | None = None,
    replace: bool = False,
) -> None:
    """Write a checkpoint atomically. `state` (optimiser, random state, mined negatives) is what resuming needs.

    Adapters of `model` are merged into the weights that are written, so whoever loads them knows of none.
    Raises CheckpointError when it cannot be written (no space, no permission, exists without `replace`).
    """
    if directory.exists() and not replace:
        raise CheckpointError(f"{directory}: exists already; choose another folder")
    try:
        _write_checkpoint(directory, model, tokenizer, config, progress, data_hash, serving_zones, state, replace)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{directory}: cannot be written ({' '.join(str(error).split())[:200]})") from error


def _write_checkpoint(
    directory: Path,
    model: DQEModel,
    tokenizer: Tokenizer,
    config: TrainConfig,
    progress: Progress,
    data_hash: str,
    serving_zones: ZoneSpec,
    state: dict[str, Tensor] | None,
    replace: bool,
) -> None:
    spec = TokenizerSpec(max_length=config.model.qformer.max_text_length, pad_id=model.embeddings.word_embeddings.padding_idx or 0)
    with atomic_directory(directory, replace=replace, marker=_META) as temporary:
        save_file({k: v.detach().cpu().contiguous() for k, v in plain_state(model).items()}, temporary / "model.safetensors")
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.save(str(temporary / spec.file))
        (temporary / "vocabulary.json").write_bytes(to_json(model.vocabulary))
        if state is not None:
            save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, temporary / "state.safetensors")
        meta = CheckpointMeta(
            schema_version=SCHEMA_VERSION,
            config=config,
            tokenizer=spec,
            data_hash=data_hash,
            progress=progress,
            serving_zones=serving_zones,
            files=build_file_entries(temporary),
        )
        (temporary / _META).write_bytes(to_json(meta))


def read_meta(directory: Path) -> CheckpointMeta:
    """Parse and verify a checkpoint directory: every file present, of the recorded size and SHA-256."""
    path = directory / _META
    try:
        recover_directory(directory)
    except OSError as error:
        raise CheckpointError(f"{directory}: its replacement was interrupted; rename {error.filename} to it") from error
    if not path.is_file():
        raise CheckpointError(f"{directory}: not a checkpoint (no {_META}); give a directory that dqe-train wrote")
    try:
        data = msgspec.json.decode(path.read_bytes())
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}); restore it or train again") from error
    # Looked at before strict parsing: a newer schema may have keys that this version would call unknown.
    version = data.get("schema_version") if isinstance(data, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise CheckpointError(f"{path}: schema {version}, this version reads up to {SCHEMA_VERSION}; upgrade dqe-engine")
    meta = parse(CheckpointMeta, data, where=str(path), error=CheckpointError)
    listed = {entry.path for entry in meta.files}
    for needed in ("model.safetensors", "vocabulary.json", meta.tokenizer.file):
        if needed not in listed:
            raise CheckpointError(f"{path}: {needed} is not in the list of files, so it cannot be verified; train again")
    for entry in meta.files:
        file = directory / entry.path
        if not file.is_file():
            raise CheckpointError(f"{file}: missing from the checkpoint; restore it or train again")
        if file.stat().st_size != entry.size or sha256_of(file) != entry.sha256:
            raise CheckpointError(f"{file}: damaged (size or SHA-256 differs from {_META}); restore it or train again")
    return meta


def load_checkpoint(directory: Path, *, as_stored: bool = False) -> Checkpoint:
    """Load a verified checkpoint to the CPU, in evaluation mode. Raises CheckpointError.

    The model is float32; with `as_stored`, a vision tower that was frozen in half precision stays so.
    """
    meta = read_meta(directory)
    vocabulary = parse_json(
        AttributeVocabulary, (directory / "vocabulary.json").read_bytes(), where=str(directory / "vocabulary.json"), error=CheckpointError
    )
    tokenizer = Tokenizer.from_file(str(directory / meta.tokenizer.file))
    try:
        model = DQEModel(meta.config.model, vocabulary, tokenizer.get_vocab_size(), meta.tokenizer.pad_id, empty_vision=True)
        weights = directory / "model.safetensors"
        if as_stored:
            with safe_open(weights, framework="pt") as stream:
                model.vision_model.to(stream.get_tensor("vision_model.post_layernorm.weight").dtype)
        copy_weights(model, [weights], where=directory)
    except (CheckpointError, SafetensorError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{directory}/model.safetensors: does not fit the configuration ({' '.join(str(error).split())[:300]})"
        ) from error
    return Checkpoint(model.eval(), tokenizer, meta, directory)


def encoder_hash(model: DQEModel) -> str:
    """SHA-256 of all that attribute heads are trained on: names, shapes and float32 values of every weight but their own."""
    found = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if not name.startswith("attribute_heads."):
            found.update(f"{name} {tuple(value.shape)} ".encode())
            found.update(value.float().contiguous().numpy().data)
    return found.hexdigest()


def latest_checkpoint(run: Path) -> Path | None:
    """The newest `step-*` checkpoint of a run that verifies; damaged ones are passed over only if an older one is whole."""
    candidates = sorted(run.glob("step-*"), reverse=True)
    damage: CheckpointError | None = None
    for candidate in candidates:
        try:
            read_meta(candidate)
        except (CheckpointError, InputError) as error:
            damage = damage or CheckpointError(str(error))
            continue
        return candidate
    if damage is not None:
        raise damage
    return None


def clean_run(run: Path) -> None:
    """Remove what killed writers left in a run; put back a checkpoint whose replacement never landed."""
    for name in {temporary.name.split(".")[1].removeprefix("tmp-") for temporary in run.glob(".tmp-step-*")}:
        remove_stale_temporaries(run / name)


def prune_checkpoints(run: Path, keep: int = 2) -> None:
    """Remove all but the newest `keep` step checkpoints. A kill meanwhile leaves none of them half removed."""
    for old in sorted(run.glob("step-*"), reverse=True)[keep:]:
        with scratch_directory(old) as trash:
            os.replace(old, trash / "pruned")


def load_state(directory: Path) -> dict[str, Tensor]:
    """The tensors that `save_checkpoint(state=...)` wrote."""
    path = directory / "state.safetensors"
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; this checkpoint can be evaluated and exported, not resumed")
    return load_file(path)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's state, flattened to `optimizer.<parameter position>.<name>`."""
    return {
        f"optimizer.{position}.{name}": value
        for position, entries in optimizer.state_dict()["state"].items()
        for name, value in entries.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`."""
    plain = optimizer.state_dict()
    entries: dict[int, dict[str, Tensor]] = {}
    for key, value in state.items():
        if key.startswith("optimizer."):
            _, position, name = key.split(".")
            entries.setdefault(int(position), {})[name] = value
    plain["state"] = entries
    optimizer.load_state_dict(plain)
