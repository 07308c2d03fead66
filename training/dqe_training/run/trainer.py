"""Training: schedule and epochs. The step is in step.py, what resumes a run in run_state.py, TRNS in trns/, validation in validation.py."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from dqe_engine.contracts.parsing import parse_json, to_json
from dqe_engine.errors import CheckpointError, InputError

from ..checkpointing.checkpoint import (
    UNCALIBRATED_ZONES,
    Progress,
    latest_checkpoint,
    load_checkpoint,
    read_meta,
    save_checkpoint,
)
from ..checkpointing.meta import WEIGHTS, Validated
from ..checkpointing.start import read_start
from ..config import TrainConfig
from ..data.triplets import TextBatcher, TripletData
from ..distributed import World
from ..encoding import Listener, TokenTable, TrainingImages
from ..model import DQEModel
from ..model.adapters import merge_adapters, prepare_finetuning
from ..model.prompts import PromptTokens
from ..trns.refreshing import Negatives
from .guide import load_guide
from .interrupts import held_signals
from .optim import build_optimizer, set_rate
from .state import LOG, RunState
from .step import Batch, TrainingStep
from .validation import BEST, Validation, Validator


def data_hash(data: TripletData, images: NDArray[np.uint8]) -> str:
    """Identity of a triplet set and its `images` (pixels, or hashes of the files): resuming on another is refused."""
    digest = hashlib.sha256()
    for array in (images, data.reference, data.target, data.named, data.labels):
        digest.update(np.ascontiguousarray(array).data)
    digest.update("\0".join((*data.images, *data.training_texts)).encode())
    return digest.hexdigest()[:32]


class Trainer:
    """Trains `model` on `data` in `run`; `train()` resumes from the newest checkpoint there.

    `pixels` (I, H, W, 3) uint8 are the images of `data.images`, resized. With a frozen vision tower
    (`vision_learning_rate` 0) their tokens are computed once and kept in float16; given as `image_tokens` (I, P, Hv), as from
    a feature cache, pixels need not be there. `image_digests`: SHA-256 of the image files, their identity; without, the
    pixels are. `validation`: queries to judge the model by, so that the best one stays in `run`/best; what is trained is the same to the
    bit with and without. `features`: a feature cache for their images. `world`: the ranks that train together, each with a trainer that
    is given the same; the main one alone validates, listens, logs and writes checkpoints, and all have the same model in the end.
    """

    def __init__(
        self,
        model: DQEModel,
        tokenizer: Tokenizer,
        config: TrainConfig,
        data: TripletData,
        pixels: NDArray[np.uint8] | None,
        run: Path,
        *,
        listener: Listener = lambda event: None,
        image_tokens: TokenTable | None = None,
        image_digests: Sequence[str] | None = None,
        validation: Validation | None = None,
        features: Path | None = None,
        world: World | None = None,
    ) -> None:
        frozen = config.optim.vision_learning_rate == 0
        if image_tokens is not None and not frozen:
            raise InputError(
                f"image_tokens need a frozen tower, got optim.vision_learning_rate {config.optim.vision_learning_rate}; set it to 0"
            )
        if pixels is None and image_tokens is None:
            raise InputError("got neither pixels nor image_tokens; pass one of them")
        if len(data) < 2:
            raise InputError(f"{len(data)} triplet(s): at least 2 are needed for in-batch contrast; add some")
        self.model, self.tokenizer, self.config, self.data, self.run = model, tokenizer, config, data, Path(run)
        self.world = world or World()
        self.listener = listener if self.world.main else silent
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.batch_size = min(config.optim.batch_size, len(data))
        if self.batch_size % self.world.size:
            raise InputError(
                f"a batch of {self.batch_size} triplets cannot be shared by {self.world.size} ranks; "
                f"make optim.batch_size, which is the whole batch, a multiple of {self.world.size}"
            )
        self.steps_per_epoch = len(data) // self.batch_size
        prepare_finetuning(model, config)
        model.to(self.device)
        model.checkpoint_activations = config.optim.checkpoint_activations
        prompts = PromptTokens(model, seed=config.optim.seed) if config.prompted else None
        self.optimizer = build_optimizer(model, config.optim, prompts, temperature=config.loss.temperature)
        self.progress = Progress()
        self.serving_zones = UNCALIBRATED_ZONES
        texts = TextBatcher(tokenizer, data.training_texts, max_length=config.model.qformer.max_text_length, captions=config.model.captions)
        self._images = TrainingImages(model, pixels, image_tokens, frozen=frozen, encoder_frozen=config.encoder_frozen, world=self.world)
        self._negatives = Negatives(model, config.trns, data, texts, self._images, self.world, seed=config.optim.seed)
        self._step = TrainingStep(
            model, self.optimizer, config, data, texts, self._images, self.world, prompts=prompts, guide=load_guide(config, self.device)
        )
        start = read_start(config.start) if config.start else None
        self._state = RunState(
            self.run, self.world, self.device, model, tokenizer, config, self.optimizer, self._negatives, self._step,
            data_hash=data_hash(data, _identity(pixels, image_digests)),
            start_hash=start.file(WEIGHTS).sha256 if start else "", imported=start.imported if start else None,
            given_tokens=image_tokens is not None,
        )  # fmt: skip
        self._validator = None if validation is None else Validator(validation, frozen=frozen, features=features)
        if self.world.rank:  # dropout of its own; what was drawn before, the weights, is the same on every rank
            torch.manual_seed(config.optim.seed + 1_000_003 * self.world.rank)

    # -- schedule ---------------------------------------------------------------------------------------------------

    def fraction(self) -> float:
        """How much of the training is done, in [0, 1]."""
        o = self.config.optim
        done = self.progress.seconds / o.seconds if o.seconds > 0 else self.progress.step / (o.steps or o.epochs * self.steps_per_epoch)
        return min(done, 1.0)

    @property
    def negatives(self) -> Negatives:
        """What was mined last, and what it was mined from."""
        return self._negatives

    def _epoch_order(self, epoch: int) -> NDArray[np.int64]:
        return np.random.default_rng([self.config.optim.seed, epoch]).permutation(len(self.data))

    def train(self) -> DQEModel:
        """Run to the end of the schedule, resuming where the run directory stands. Returns the model, in eval mode.

        Ctrl-C and SIGTERM, on any rank, finish the step, write a checkpoint and raise KeyboardInterrupt on all.
        """
        self._resume()
        if not self.progress.finished:
            self._images.prepare(self.listener)
            if self._validator is not None and self.world.main:
                self._validator.prepare(self.model, self.listener)
            self._mend_best()
            self.model.train(not self.config.encoder_frozen)  # what is frozen embeds as it will when it serves, without dropout
            with held_signals(several=self.world.size > 1) as asked, open(self._log_file(), "a", encoding="utf-8") as log:
                epoch = self.progress.epoch
                while self.fraction() < 1.0:
                    self._train_epoch(epoch, log, asked)
                    epoch += 1
                if self.progress.validated is None or self.progress.validated.step != self.progress.step:
                    self._validate(log)
            self.progress = msgspec.structs.replace(self.progress, finished=True)
            self.serving_zones = self._negatives.calibrate(self.config.optim.seed)
            self._checkpoint()
        merge_adapters(self.model)
        return self.model.eval()

    def _train_epoch(self, epoch: int, log: IO[str], asked: Callable[[], bool]) -> None:
        o = self.config.optim
        done = self.progress.step_in_epoch if epoch == self.progress.epoch else 0
        if done == 0:
            self._begin_epoch(epoch)
        order = self._epoch_order(epoch)
        read, named = self.data.draw_texts(o.seed, epoch)
        for position in range(done, self.steps_per_epoch):
            fraction = self.fraction()
            if fraction >= 1.0:
                return
            started = time.perf_counter()
            rate = set_rate(self.optimizer, o, fraction)
            rows = order[position * self.batch_size : (position + 1) * self.batch_size]
            batch = Batch(self.progress.step, rows, read[rows], named[rows], self._negatives.draw(rows, epoch))
            share = self.config.loss.relevance_share if fraction >= self.config.loss.relevance_warmup else 0.0
            _, parts = self._step.run(batch, relevance_share=share)
            (elapsed,) = self.world.maximum(time.perf_counter() - started)  # ranks agree on the clock: it may drive the schedule
            p = self.progress
            self.progress = msgspec.structs.replace(p, step=p.step + 1, step_in_epoch=position + 1, seconds=p.seconds + elapsed)
            if self.progress.step % o.log_every == 0 or position == 0:
                event = {
                    "event": "step",
                    "step": self.progress.step,
                    "epoch": epoch,
                    "fraction": round(self.fraction(), 5),
                    "learning_rate": rate,
                }
                event |= {"triplets_per_second": round(self.batch_size / elapsed, 1), "seconds": round(self.progress.seconds, 3)}
                event |= {f"loss/{name}": round(value, 5) for name, value in parts.items()}
                self._report(event, log)
            saved = False
            if self._validator is not None and self._validator.due(self.progress.step, self.steps_per_epoch):
                saved = self._validate(log)
            if any(self.world.maximum(asked())):  # on any rank
                self._checkpoint()
                self.world.maximum(0.0)  # nobody leaves before the checkpoint is there
                raise KeyboardInterrupt
            if self.progress.step % o.checkpoint_every == 0 and not saved:
                self._checkpoint()
        self.progress = msgspec.structs.replace(self.progress, epoch=epoch + 1, step_in_epoch=0)

    def _report(self, event: dict[str, Any], log: IO[str]) -> None:
        log.write(json.dumps(event) + "\n")
        log.flush()
        self.listener(event)

    # -- validation -------------------------------------------------------------------------------------------------

    def _validate(self, log: IO[str]) -> bool:
        """Judge the model as it is, on the main rank. The best so far is kept, with a checkpoint that says so: whether there is one."""
        if self._validator is None:
            return False
        validator, p = self._validator, self.progress
        told = self.world.from_main(lambda: to_json(validator.validate(self.model, self.tokenizer, p.step)))
        found = parse_json(Validated, told, where="validation")
        better = p.best is None or found.value > p.best.value
        self.progress = msgspec.structs.replace(p, validated=found, best=found if better else p.best)
        event = {"event": "validation", "step": p.step, "epoch": p.epoch, "seconds": round(p.seconds, 3), "best": better}
        self._report(event | {"headline": found.headline} | {f"val/{name}": round(value, 5) for name, value in found.figures.items()}, log)
        if better:
            self._checkpoint()  # first: a kill between the two leaves a checkpoint that knows its model to be the best
            self._save_best()
        return better

    def _mend_best(self) -> None:
        """Save the best model where a kill came between its checkpoint and its copy."""
        best = self.progress.best
        if best is None or best.step != self.progress.step:
            return

        def missing() -> bytes:
            try:
                return b"" if read_meta(self.run / BEST).progress.step == best.step else b"missing"
            except CheckpointError:
                return b"missing"

        if self.world.from_main(missing):
            self._save_best()

    def _save_best(self) -> None:
        """The model as it is, with zones to serve with, is the run's best."""
        zones = self._negatives.calibrate(self.config.optim.seed)
        if self.world.main:
            self._state.save(self.run / BEST, self.progress, zones)

    # -- epochs -----------------------------------------------------------------------------------------------------

    def _begin_epoch(self, epoch: int) -> None:
        """Mine, where a refresh is due."""
        started = time.perf_counter()
        mined = None
        if self._negatives.due(epoch):
            mined = self._negatives.refresh(epoch)
        (elapsed,) = self.world.maximum(time.perf_counter() - started)
        if mined is not None:
            self.listener({"event": "refresh", "epoch": epoch, "seconds": elapsed} | mined)
        self.progress = msgspec.structs.replace(self.progress, epoch=epoch, step_in_epoch=0, seconds=self.progress.seconds + elapsed)

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def _log_file(self) -> Path:
        return self.run / LOG if self.world.main else Path(os.devnull)

    def _checkpoint(self) -> None:
        self._state.checkpoint(self.progress, self.serving_zones)

    def _resume(self) -> None:
        meta = self._state.resume(None if self._validator is None else self._validator.identity)
        if meta is not None:
            self.progress, self.serving_zones = meta.progress, meta.serving_zones
            self.listener({"event": "resume", "step": self.progress.step})


def silent(event: dict[str, Any]) -> None:
    """The listener of ranks other than the main one."""


def _identity(pixels: NDArray[np.uint8] | None, digests: Sequence[str] | None) -> NDArray[np.uint8]:
    if digests is not None:
        return np.frombuffer(bytes.fromhex("".join(digests)), np.uint8)
    if pixels is None:
        raise InputError("image_tokens without pixels need image_digests, so that a resumed run can tell the images")
    return pixels


def finish_run(run: Path, destination: Path, *, replace: bool = False) -> None:
    """Copy a finished run's newest checkpoint without its optimiser state: what dqe-export and dqe-eval take.

    Raises CheckpointError when the run holds none, or when `destination` exists without `replace`.
    """
    newest = latest_checkpoint(run)
    if newest is None:
        raise CheckpointError(f"{run}: holds no checkpoint; train first")
    checkpoint = load_checkpoint(newest, as_stored=True)
    meta = checkpoint.meta
    save_checkpoint(
        destination, checkpoint.model, checkpoint.tokenizer, config=meta.config, progress=meta.progress, data_hash=meta.data_hash,
        serving_zones=meta.serving_zones, start_hash=meta.start_hash, imported=meta.imported, replace=replace,
    )  # fmt: skip
