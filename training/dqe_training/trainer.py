"""Training: batches, schedule, TRNS refresh, checkpoints that resume exactly."""

from __future__ import annotations

import hashlib
import json
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from dqe_engine.contracts.zones import ZoneSpec
from dqe_engine.errors import CheckpointError, InputError
from dqe_engine.files import atomic_write
from dqe_engine.zones.mining import mine_negatives

from .checkpoint import (
    SCHEMA_VERSION,
    UNCALIBRATED_ZONES,
    Progress,
    clean_run,
    latest_checkpoint,
    load_checkpoint,
    load_state,
    optimizer_tensors,
    prune_checkpoints,
    read_meta,
    restore_optimizer,
    save_checkpoint,
)
from .config import TrainConfig
from .data.images import to_pixel_values
from .data.triplets import TextBatcher, TripletData
from .encoding import Listener, TokenTable, encode_image_tokens, encode_target_tokens, evaluating
from .features.identity import same_tower
from .losses.total import BatchLabels, total_loss
from .model import DQEModel, QueryOutput
from .model.adapters import adapter_state, merge_adapters, prepare_finetuning, restore
from .optim import build_optimizer, set_rate
from .serving_zones import calibrate_zones
from .trns import draw_negative

_CALIBRATION_QUERIES = 2_000


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
    pixels are.
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
    ) -> None:
        frozen = config.optim.vision_learning_rate == 0
        if image_tokens is not None and not frozen:
            raise InputError(f"image_tokens are of a frozen tower, but optim.vision_learning_rate is {config.optim.vision_learning_rate}")
        if pixels is None and image_tokens is None:
            raise InputError("neither pixels nor image_tokens: give one of them")
        if len(data) < 2:
            raise InputError(f"{len(data)} triplet(s): at least 2 are needed for in-batch contrast")
        self.model, self.tokenizer, self.config, self.data, self.run = model, tokenizer, config, data, Path(run)
        self.listener = listener
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.batch_size = min(config.optim.batch_size, len(data))
        self.steps_per_epoch = len(data) // self.batch_size
        self.texts = TextBatcher(tokenizer, data.training_texts, max_length=config.model.qformer.max_text_length)
        self.frozen = frozen
        prepare_finetuning(model, config)
        model.to(self.device)
        self._pixels = pixels
        self._tokens = image_tokens
        self._given_tokens = image_tokens is not None
        self._hash = data_hash(data, _identity(pixels, image_digests))
        self.optimizer = build_optimizer(model, config.optim)
        self.progress = Progress()
        self._mined: NDArray[np.int64] | None = None
        # Query embeddings of the running epoch for TRNS, and the step that made each (-1: none).
        self._bank = torch.zeros(len(data), config.model.qformer.embedding_dim)
        self._bank_step = torch.full((len(data),), -1, dtype=torch.int64)
        self.serving_zones = UNCALIBRATED_ZONES
        self._stop = False

    # -- data -------------------------------------------------------------------------------------------------------

    def _image_tokens(self, rows: NDArray[np.int64]) -> Tensor:
        if self.frozen:
            if self._tokens is None:  # not before resuming, which may bring the tower
                assert self._pixels is not None
                self._tokens = encode_image_tokens(self.model, self._pixels, listener=self.listener)
            return self._tokens[torch.from_numpy(rows)].to(self.device).float()
        assert self._pixels is not None
        return self.model.encode_images(to_pixel_values(self._pixels[rows], self.config.model.preprocessing).to(self.device))

    def _epoch_order(self, epoch: int) -> NDArray[np.int64]:
        return np.random.default_rng([self.config.optim.seed, epoch]).permutation(len(self.data))

    # -- schedule ---------------------------------------------------------------------------------------------------

    def fraction(self) -> float:
        """How much of the training is done, in [0, 1]."""
        o = self.config.optim
        done = self.progress.seconds / o.seconds if o.seconds > 0 else self.progress.step / (o.epochs * self.steps_per_epoch)
        return min(done, 1.0)

    # -- TRNS -------------------------------------------------------------------------------------------------------

    def _encode_queries(self, rows: NDArray[np.int64]) -> Tensor:
        """Composed queries (B, D) of some triplets with the model as it is."""
        with evaluating(self.model):
            parts = []
            for part in np.array_split(rows, -(-len(rows) // 256) or 1):
                ids, mask = (t.to(self.device) for t in self.texts(torch.from_numpy(part)))
                parts.append(self.model.encode_query(self._image_tokens(self.data.reference[part]), ids, mask).query.float().cpu())
            return torch.cat(parts)

    def _encode_gallery(self) -> NDArray[np.float32]:
        return encode_target_tokens(self.model, self._image_tokens, len(self.data.images))

    def _refresh_negatives(self, epoch: int) -> None:
        """Mine for every query. Embeddings of the last half epoch are used as they are, older ones are made again: early in
        training, a query of an epoch ago says little about the model's mistakes now."""
        t = self.config.trns
        if not t.enabled or epoch < t.warmup_epochs or (epoch - t.warmup_epochs) % t.interval:
            return
        started = time.perf_counter()
        stale = (self._bank_step < max(self.progress.step - self.steps_per_epoch // 2, 0)).nonzero()[:, 0]
        if len(stale):
            self._bank[stale] = self._encode_queries(stale.numpy())
        zones = msgspec.structs.replace(t.zones, seed=(t.zones.seed + 1_000_003 * epoch) % 2**64)
        exclude = self.data.reference[:, None]
        mined = mine_negatives(self._bank.numpy(), self._encode_gallery(), self.data.target, zones=zones, picks=t.picks, exclude=exclude)
        self._mined = mined.picks
        event = {"event": "refresh", "epoch": epoch, "seconds": time.perf_counter() - started, "encoded_again": len(stale)}
        self.listener(event | {"empty": float((self._mined[:, 0] < 0).mean())})

    @property
    def mined(self) -> NDArray[np.int64] | None:
        """(T, P): the negatives of the last refresh, positions of `data.images`, padded with -1; None before the first."""
        return self._mined

    def embeddings(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Queries (B, D) of these triplets and target tokens (I, M, D) of all images, of the model as it is."""
        return self._encode_queries(rows).numpy(), self._encode_gallery()

    def _calibrate(self) -> ZoneSpec:
        rows = np.random.default_rng(self.config.optim.seed).permutation(len(self.data))[:_CALIBRATION_QUERIES]
        queries = self._encode_queries(rows).numpy()
        return calibrate_zones(queries, self._encode_gallery(), self.data.target[rows], self.data.reference[rows])

    # -- steps ------------------------------------------------------------------------------------------------------

    def _step(self, rows: NDArray[np.int64], epoch: int, fraction: float) -> dict[str, float]:
        config, data = self.config, self.data
        index = torch.from_numpy(rows)
        read, named = data.draw_texts(config.optim.seed, epoch)
        ids, mask = (t.to(self.device) for t in self.texts(torch.from_numpy(read[rows])))
        targets = data.target[rows]
        negative = draw_negative(self._mined, rows, epoch) if self._mined is not None else None
        cast = torch.autocast(self.device.type, torch.bfloat16) if config.optim.autocast == "bf16" else nullcontext()
        with cast:
            output = self.model.encode_query(self._image_tokens(data.reference[rows]), ids, mask)
            wanted = targets if negative is None else np.concatenate([targets, np.maximum(negative, 0)])
            tokens = self.model.encode_targets(self._image_tokens(wanted))
        output, tokens = QueryOutput(*(part.float() for part in output)), tokens.float()  # losses in float32, whatever the cast
        labels = BatchLabels(
            torch.from_numpy(targets).to(self.device),
            torch.from_numpy(data.labels[targets]).to(self.device),
            torch.from_numpy(named[rows]).to(self.device),
        )
        mined = None if negative is None else (tokens[len(rows) :], torch.from_numpy(negative >= 0).to(self.device))
        share = config.loss.relevance_share if fraction >= config.loss.relevance_warmup else 0.0
        loss, parts = total_loss(output, tokens[: len(rows)], labels, config.loss, relevance_share=share, negatives=mined)
        if not torch.isfinite(loss):
            raise CheckpointError(f"the loss is {loss.item()} at step {self.progress.step}; lower optim.learning_rate or check the data")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), config.optim.clip_norm)
        self.optimizer.step()
        self._bank[index] = output.query.detach().float().cpu()
        self._bank_step[index] = self.progress.step
        return {name: value.item() for name, value in parts.items()}

    def train(self) -> DQEModel:
        """Run to the end of the schedule, resuming where the run directory stands. Returns the model, in eval mode.

        Ctrl-C finishes the step, writes a checkpoint and raises KeyboardInterrupt.
        """
        try:
            self.run.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{self.run}: cannot be the run directory ({error.strerror})") from error
        self._resume()
        if not self.progress.finished:
            self.model.train()
            with self._interruptible(), open(self.run / "metrics.jsonl", "a", encoding="utf-8") as log:
                epoch = self.progress.epoch
                while self.fraction() < 1.0:
                    self._train_epoch(epoch, log)
                    epoch += 1
            self.progress = msgspec.structs.replace(self.progress, finished=True)
            self.serving_zones = self._calibrate()
            self._checkpoint()
        merge_adapters(self.model)
        return self.model.eval()

    def _train_epoch(self, epoch: int, log: Any) -> None:
        o = self.config.optim
        done = self.progress.step_in_epoch if epoch == self.progress.epoch else 0
        if done == 0:
            started = time.perf_counter()
            self._refresh_negatives(epoch)
            self.progress = msgspec.structs.replace(
                self.progress, epoch=epoch, step_in_epoch=0, seconds=self.progress.seconds + time.perf_counter() - started
            )
        order = self._epoch_order(epoch)
        for position in range(done, self.steps_per_epoch):
            fraction = self.fraction()
            if fraction >= 1.0:
                return
            started = time.perf_counter()
            rate = set_rate(self.optimizer, o, fraction)
            parts = self._step(order[position * self.batch_size : (position + 1) * self.batch_size], epoch, fraction)
            elapsed = time.perf_counter() - started
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
                log.write(json.dumps(event) + "\n")
                log.flush()
                self.listener(event)
            if self._stop:
                self._checkpoint()
                raise KeyboardInterrupt
            if self.progress.step % o.checkpoint_every == 0:
                self._checkpoint()
        self.progress = msgspec.structs.replace(self.progress, epoch=epoch + 1, step_in_epoch=0)

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def _checkpoint(self) -> None:
        state = optimizer_tensors(self.optimizer) | adapter_state(self.model)
        state |= {"bank": self._bank, "bank_step": self._bank_step, "rng": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["cuda_rng"] = torch.cuda.get_rng_state(self.device)
        if self._mined is not None:
            state["mined"] = torch.from_numpy(self._mined)
        save_checkpoint(
            self.run / f"step-{self.progress.step:08d}", self.model, self.tokenizer, config=self.config, progress=self.progress,
            data_hash=self._hash, serving_zones=self.serving_zones, state=state, replace=True,
        )  # fmt: skip
        prune_checkpoints(self.run)

    def _resume(self) -> None:
        clean_run(self.run)
        newest = latest_checkpoint(self.run)
        if newest is None:
            (self.run / "metrics.jsonl").unlink(missing_ok=True)
            return
        meta = read_meta(newest)
        if meta.config != self.config:
            raise CheckpointError(f"{newest}: made with another configuration; use the same one to resume, or another run directory")
        if meta.data_hash != self._hash:
            old = " or by an earlier version, whose runs are not resumed" if meta.schema_version < SCHEMA_VERSION else ""
            raise CheckpointError(f"{newest}: made with other training data{old}; use the same to resume, or another run directory")
        if Tokenizer.from_file(str(newest / meta.tokenizer.file)).get_vocab() != self.tokenizer.get_vocab():
            raise CheckpointError(f"{newest}: made with another tokenizer; use the same version to resume, or another run directory")
        state, weights = load_state(newest), load_file(newest / "model.safetensors")
        if self._given_tokens and not same_tower(self.model, weights):
            raise CheckpointError(f"{newest}: its vision tower is not the one that the image tokens are of; resume with the same backbone")
        restore(self.model, weights, state)
        restore_optimizer(self.optimizer, state)
        torch.set_rng_state(state["rng"].to(torch.uint8))
        if self.device.type == "cuda" and "cuda_rng" in state:
            torch.cuda.set_rng_state(state["cuda_rng"].to(torch.uint8), self.device)
        self._bank, self._bank_step = state["bank"], state["bank_step"]
        self._mined = state["mined"].numpy() if "mined" in state else None
        self.progress, self.serving_zones = meta.progress, meta.serving_zones
        _truncate_log(self.run / "metrics.jsonl", self.progress.step)
        self.listener({"event": "resume", "step": self.progress.step})

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def request(signum: int, frame: Any) -> None:
            self._stop = True

        previous = signal.signal(signal.SIGINT, request)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)


def _identity(pixels: NDArray[np.uint8] | None, digests: Sequence[str] | None) -> NDArray[np.uint8]:
    if digests is not None:
        return np.frombuffer(bytes.fromhex("".join(digests)), np.uint8)
    if pixels is None:
        raise InputError("image_tokens without pixels need image_digests, so that a resumed run can tell the images")
    return pixels


def _truncate_log(path: Path, step: int) -> None:
    """Drop log lines after `step`: a killed run had written some that the checkpoint does not have."""
    if not path.is_file():
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


def finish_run(run: Path, destination: Path, *, replace: bool = False) -> None:
    """Copy a finished run's newest checkpoint without its optimiser state: what dqe-export and dqe-eval take.

    Raises CheckpointError when the run holds none, or when `destination` exists without `replace`.
    """
    newest = latest_checkpoint(run)
    if newest is None:
        raise CheckpointError(f"{run}: holds no checkpoint")
    checkpoint = load_checkpoint(newest, as_stored=True)
    meta = checkpoint.meta
    save_checkpoint(
        destination, checkpoint.model, checkpoint.tokenizer, config=meta.config, progress=meta.progress, data_hash=meta.data_hash,
        serving_zones=meta.serving_zones, replace=replace,
    )  # fmt: skip
