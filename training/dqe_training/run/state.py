"""A run directory's checkpoints: what is written while a model trains, and how a run goes on from them to the bit."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.optim import Optimizer

from dqe_engine.contracts.parsing import to_json
from dqe_engine.contracts.provenance import Provenance
from dqe_engine.contracts.zones import ZoneSpec
from dqe_engine.errors import CheckpointError, InputError
from dqe_engine.files import atomic_write, require_regular

from ..checkpointing.checkpoint import (
    Progress,
    clean_run,
    latest_checkpoint,
    load_state,
    optimizer_tensors,
    prune_checkpoints,
    read_meta,
    restore_optimizer,
    save_checkpoint,
)
from ..checkpointing.meta import OLDEST_RESUMED, WEIGHTS, CheckpointMeta
from ..config import TrainConfig
from ..distributed import World
from ..features.identity import same_tower
from ..model import DQEModel
from ..model.adapters import adapter_state, restore
from ..trns.refreshing import Negatives
from .random_state import random_state, restore_random_state
from .step import TrainingStep

LOG = "metrics.jsonl"


@dataclass(frozen=True, eq=False)
class RunState:
    """Everything that training changes, on disk and back. Every rank has one; the main one writes.

    `data_hash`, `start_hash`: identity of the training data, and of the weights that training began with (empty without `config.start`).
    `imported`: where those come from, if not from training here.
    `given_tokens`: whether the vision tower's tokens were made elsewhere, so that its weights must be those of the checkpoint.
    """

    run: Path
    world: World
    device: torch.device
    model: DQEModel
    tokenizer: Tokenizer
    config: TrainConfig
    optimizer: Optimizer
    negatives: Negatives
    step: TrainingStep
    data_hash: str
    start_hash: str
    imported: Provenance | None
    given_tokens: bool

    def checkpoint(self, progress: Progress, zones: ZoneSpec) -> None:
        """Called by all ranks; the main one writes, with every rank's random state, and removes checkpoints that are too old."""
        random = {name: self.world.gather(state[None])[0] for name, state in random_state(self.device).items()}  # (size, n)
        if not self.world.main:
            return
        state = optimizer_tensors(self.optimizer) | adapter_state(self.model) | self.negatives.state() | self.step.state() | random
        self.save(self.run / f"step-{progress.step:08d}", progress, zones, state=state)
        prune_checkpoints(self.run)

    def save(self, directory: Path, progress: Progress, zones: ZoneSpec, *, state: dict[str, Tensor] | None = None) -> None:
        """The model as it is; with `state`, what a run needs to go on besides."""
        save_checkpoint(
            directory, self.model, self.tokenizer, config=self.config, progress=progress, data_hash=self.data_hash, serving_zones=zones,
            state=state, start_hash=self.start_hash, imported=self.imported, replace=True,
        )  # fmt: skip

    def resume(self, judged_by: str | None) -> CheckpointMeta | None:
        """Go on from the newest checkpoint, and drop what the log says of later steps; None where there is none.

        `judged_by`: identity of the validation queries. Raises CheckpointError where a checkpoint is of another run, InputError where the
        run directory cannot be one.
        """
        self.world.agree("configuration, triplets and images", f"{to_json(self.config)!r} {self.data_hash} {self.start_hash}")
        name = self.world.from_main(lambda: self._newest().encode()).decode()
        if not name:
            return None
        newest = self.run / name
        if not newest.is_dir():
            raise CheckpointError(f"{newest}: rank {self.world.rank} does not see it; use a run directory that all ranks share")
        meta = read_meta(newest)
        self._require_same(newest, meta, judged_by)
        state, weights = load_state(newest), load_file(newest / WEIGHTS)
        if self.given_tokens and not same_tower(self.model, weights):
            raise CheckpointError(f"{newest}: its vision tower is not the one that made the image tokens; resume with the same backbone")
        restore(self.model, weights, state)
        restore_optimizer(self.optimizer, state)
        self._restore_random(state)
        self.negatives.restore(state)
        self.step.restore(state)
        if self.world.main:
            _truncate_log(self.run / LOG, meta.progress.step)
        return meta

    def _newest(self) -> str:
        """Name of the newest whole checkpoint, empty where there is none; what killed writers left is removed."""
        try:
            self.run.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{self.run}: cannot be the run directory ({error.strerror}); choose another one") from error
        clean_run(self.run)
        newest = latest_checkpoint(self.run)
        if newest is None:
            (self.run / LOG).unlink(missing_ok=True)
            return ""
        return newest.name

    def _require_same(self, newest: Path, meta: CheckpointMeta, judged_by: str | None) -> None:
        """Raise CheckpointError where the checkpoint is of another training than this one."""
        if meta.schema_version < OLDEST_RESUMED:
            raise CheckpointError(
                f"{newest}: made by an earlier version, whose runs are not resumed; use another run directory, or begin anew from its "
                f"weights with start={newest}"
            )
        if meta.config != self.config:
            raise CheckpointError(f"{newest}: made with another configuration; use the same one to resume, or another run directory")
        if meta.data_hash != self.data_hash:
            raise CheckpointError(f"{newest}: made with other training data; use the same to resume, or another run directory")
        if meta.start_hash != self.start_hash:
            raise CheckpointError(
                f"{newest}: began with other weights than {self.config.start} holds now; put those back, or use another run directory"
            )
        if judged_by is not None and (best := meta.progress.best) is not None and best.split != judged_by:
            raise CheckpointError(f"{newest}: its best model was chosen by other queries; give the same, or use another run directory")
        if Tokenizer.from_file(str(newest / meta.tokenizer.file)).get_vocab() != self.tokenizer.get_vocab():
            raise CheckpointError(f"{newest}: made with another tokenizer; use the same version to resume, or another run directory")

    def _restore_random(self, state: dict[str, Tensor]) -> None:
        """This rank's random state; one more rank than were there before goes on with numbers of its own."""
        saved = {name: torch.atleast_2d(state[name]) for name in ("rng", "cuda_rng") if name in state}
        if self.world.rank < len(saved["rng"]):
            restore_random_state({name: rows[self.world.rank].clone() for name, rows in saved.items()}, self.device)


def _truncate_log(path: Path, step: int) -> None:
    """Drop log lines after `step`: a killed run had written some that the checkpoint does not have."""
    try:
        require_regular(path)
    except FileNotFoundError:
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (json.JSONDecodeError, KeyError):
            break  # the line that the kill cut short
    with atomic_write(path, "w") as stream:
        stream.write("".join(line + "\n" for line in kept))
