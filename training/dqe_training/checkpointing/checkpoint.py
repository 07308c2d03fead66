"""Checkpoints: a directory of safetensors and JSON, whole or absent, verified before use. No pickle. Their record: meta.py."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from msgspec import UNSET
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from dqe_engine.bundle import build_file_entries
from dqe_engine.contracts.parsing import to_json
from dqe_engine.contracts.provenance import Provenance
from dqe_engine.contracts.tokenizer import TokenizerSpec
from dqe_engine.contracts.vocabulary import AttributeVocabulary
from dqe_engine.contracts.zones import ZoneSpec
from dqe_engine.errors import CheckpointError, InputError
from dqe_engine.files import atomic_directory, remove_stale_temporaries, scratch_directory

from ..backbone.weights import HEADS, TEMPERATURE, copy_weights
from ..config import ModelConfig, TrainConfig
from ..model import DQEModel
from ..model.adapters import plain_state
from .meta import META, UNCALIBRATED_ZONES, VOCABULARY, WEIGHTS, CheckpointMeta, Progress, read_meta
from .start import check_start, read_attributes, start_directory

__all__ = [
    "UNCALIBRATED_ZONES", "Checkpoint", "CheckpointMeta", "Progress", "clean_run", "latest_checkpoint", "load_checkpoint", "load_start",
    "load_state", "optimizer_tensors", "prune_checkpoints", "read_meta", "restore_optimizer", "save_checkpoint", "stored_vision_dtype",
]  # fmt: skip


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
    start_hash: str = "",
    imported: Provenance | None = None,
    replace: bool = False,
) -> None:
    """Write a checkpoint atomically. `state` (optimiser, random state, mined negatives) is what resuming needs. `imported`: where the
    weights that training began with come from, if not from training here.

    Adapters of `model` are merged into the weights that are written, so whoever loads them knows of none.
    Raises CheckpointError when it cannot be written (no space, no permission, exists without `replace`).
    """
    if directory.exists() and not replace:
        raise CheckpointError(f"{directory}: exists already; choose another folder")
    try:
        _write_checkpoint(directory, model, tokenizer, config, progress, data_hash, serving_zones, state, start_hash, imported, replace)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{directory}: cannot be written ({' '.join(str(error).split())[:200]}); free space, or choose another folder"
        ) from error


def tokenizer_spec(model: ModelConfig, *, pad_id: int) -> TokenizerSpec:
    """How the runtime is to make ids of a text for a model of this configuration."""
    captions = UNSET if model.captions == "plain" else model.captions
    return TokenizerSpec(max_length=model.qformer.max_text_length, pad_id=pad_id, captions=captions)


def _write_checkpoint(
    directory: Path,
    model: DQEModel,
    tokenizer: Tokenizer,
    config: TrainConfig,
    progress: Progress,
    data_hash: str,
    serving_zones: ZoneSpec,
    state: dict[str, Tensor] | None,
    start_hash: str,
    imported: Provenance | None,
    replace: bool,
) -> None:
    spec = tokenizer_spec(config.model, pad_id=model.embeddings.word_embeddings.padding_idx or 0)
    with atomic_directory(directory, replace=replace, marker=META) as temporary:
        save_file({k: v.detach().cpu().contiguous() for k, v in plain_state(model).items()}, temporary / WEIGHTS)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.save(str(temporary / spec.file))
        (temporary / VOCABULARY).write_bytes(to_json(model.vocabulary))
        if state is not None:
            save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, temporary / "state.safetensors")
        meta = CheckpointMeta(
            config=config,
            tokenizer=spec,
            data_hash=data_hash,
            progress=progress,
            serving_zones=serving_zones,
            files=build_file_entries(temporary),
            start_hash=start_hash,
            imported=imported,
        )
        (temporary / META).write_bytes(to_json(meta))


def load_checkpoint(directory: Path, *, as_stored: bool = False) -> Checkpoint:
    """Load a verified checkpoint to the CPU, in evaluation mode. Raises CheckpointError.

    The model is float32; with `as_stored`, a vision tower that was frozen in half precision stays so.
    """
    meta = read_meta(directory)
    vocabulary = read_attributes(directory / VOCABULARY)
    tokenizer = Tokenizer.from_file(str(directory / meta.tokenizer.file))
    try:
        model = DQEModel(meta.config.model, vocabulary, tokenizer.get_vocab_size(), meta.tokenizer.pad_id, empty_vision=True)
        if as_stored:
            model.vision_model.to(stored_vision_dtype(directory))
        copy_weights(model, [directory / WEIGHTS], where=directory)
    except (CheckpointError, SafetensorError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{directory}/{WEIGHTS}: does not fit the configuration, restore it or train again ({' '.join(str(error).split())[:300]})"
        ) from error
    return Checkpoint(model.eval(), tokenizer, meta, directory)


def stored_vision_dtype(directory: Path) -> torch.dtype:
    """The precision that a checkpoint's vision tower is stored in. An imported one may hold matrices in half precision and the rest in
    float32; its last LayerNorm is then float32, so that no bit is lost."""
    with safe_open(directory / WEIGHTS, framework="pt") as stream:
        dtype: torch.dtype = stream.get_tensor("vision_model.post_layernorm.weight").dtype
    return dtype


def load_start(model: DQEModel, config: TrainConfig) -> str:
    """Copy the weights of the verified checkpoint `config.start` into `model`, whose dtypes stay; what became of the attribute heads.

    Its heads are taken over where they were trained for the same attributes in the same order and read the same inputs, and keep
    the values that they have in `model` otherwise. Raises CheckpointError.
    """
    directory = start_directory(config.start)
    made = read_meta(directory).config.model
    check_start(config, made)
    theirs, ours = read_attributes(directory / VOCABULARY).names, model.vocabulary.names
    same = made.attribute_weights and theirs == ours and made.weights_from == config.model.weights_from
    loose: tuple[str, ...] = () if same else (HEADS,)
    if made.learned_temperature != config.model.learned_temperature:
        loose += (TEMPERATURE,)
    with safe_open(directory / WEIGHTS, framework="pt") as stream:
        unused = tuple(name for name in stream.keys() if name.startswith(loose))  # noqa: SIM118 (not a mapping)
    copy_weights(model, [directory / WEIGHTS], unused=unused, new=loose, where=directory)
    if same:
        return f"attribute heads taken over ({', '.join(ours)})"
    if not ours:
        return "no attribute heads, since the vocabulary names no attribute"
    there = "none" if not theirs else ", ".join(theirs) if made.attribute_weights else "untrained"
    return f"attribute heads drawn anew ({', '.join(ours)}; there {there})"


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
    for name in {temporary.name.split(".")[1].removeprefix("tmp-") for temporary in (*run.glob(".tmp-step-*"), *run.glob(".tmp-best*"))}:
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
    """The inverse of `optimizer_tensors`. Raises CheckpointError for the state of parameters in another order or of other shapes."""
    plain = optimizer.state_dict()
    entries: dict[int, dict[str, Tensor]] = {}
    for key, value in state.items():
        if key.startswith("optimizer."):
            _, position, name = key.split(".")
            entries.setdefault(int(position), {})[name] = value
    for at, parameter in enumerate(parameter for group in optimizer.param_groups for parameter in group["params"]):
        found = entries[at].get("exp_avg", parameter) if at in entries else parameter
        if found.shape != parameter.shape:
            raise CheckpointError(
                f"the optimiser's state of parameter {at} has shape {tuple(found.shape)}, expected {tuple(parameter.shape)}: another "
                "version grouped the parameters differently, so finish the training with that version, or begin a new run"
            )
    plain["state"] = entries
    optimizer.load_state_dict(plain)
