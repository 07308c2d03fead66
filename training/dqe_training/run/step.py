"""One training step: encode this rank's share of the batch, the loss of the whole batch, gradients, the optimiser."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dqe_engine.errors import CheckpointError

from ..config import TrainConfig
from ..data.answers import Answers
from ..data.triplets import TextBatcher, TripletData
from ..distributed import World
from ..encoding import TrainingImages
from ..losses.total import BatchLabels, Prompted, total_loss
from ..model import DQEModel, QueryOutput, score
from ..model.prompts import PromptTokens
from .random_state import random_state, restore_random_state

_PROMPTS = "prompt_tokens"
_CASTS = {"bf16": torch.bfloat16, "f16": torch.float16}


@dataclass(frozen=True, eq=False)
class Batch:
    """B triplets, the same on every rank: `rows` (B,), `read` (B,) rows of the training texts, `named` (B, A) by these, and
    from the first refresh on a mined `negative` (B,) each, -1 where there is none. `step` counts the steps before."""

    step: int
    rows: NDArray[np.int64]
    read: NDArray[np.int64]
    named: NDArray[np.bool_]
    negative: NDArray[np.int64] | None


class TrainingStep:
    """Steps of `optimizer` on `model`. With several ranks, or `optim.cached_chunk`, the gradients are those of one process that
    encodes the whole batch at once, up to rounding and the draws of dropout. `prompts`: SPRC's, where its losses are on. `guide`: the
    model that the margin filter judges by, where that is another one.

    Embeddings are made of a rank's rows, all at once or in chunks, and gathered; every rank then has the same loss. In chunks
    (GradCache, Gao et al. 2021), they are made without a graph, the loss gives the gradient with respect to them, and each
    chunk is encoded again, with the same random numbers, to send its part of that gradient on: the memory for
    activations is a chunk's.
    """

    def __init__(
        self,
        model: DQEModel,
        optimizer: torch.optim.Optimizer,
        config: TrainConfig,
        data: TripletData,
        texts: TextBatcher,
        images: TrainingImages,
        world: World,
        *,
        prompts: PromptTokens | None = None,
        guide: DQEModel | None = None,
    ) -> None:
        self._prompts, self._guide = prompts, guide
        self.model, self.optimizer, self.config, self.world = model, optimizer, config, world
        self._data, self._texts, self._images = data, texts, images
        self._answers = Answers.of(data, model.vocabulary) if config.loss.objective == "kl" else None
        self._device = model.query_tokens.device
        self._cast = _CASTS.get(config.optim.autocast)
        # Gradients of float16 activations would vanish; the scale is found as training goes, so it is part of its state.
        self._scaler = torch.amp.GradScaler(self._device.type, enabled=config.optim.autocast == "f16")

    def run(self, batch: Batch, *, relevance_share: float) -> tuple[Tensor, dict[str, float]]:
        """Queries (B, D) float32 as they were before the step, on the CPU, and the parts of the loss.

        Raises CheckpointError for a loss that is not finite, before anything is changed.
        """
        queries, parts = self.gradients(batch, relevance_share=relevance_share)
        self._scaler.unscale_(self.optimizer)
        if self.config.optim.clip_norm > 0:
            nn.utils.clip_grad_norm_(self._parameters(), self.config.optim.clip_norm)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self.model.bound_temperature(self.config.loss.temperature)
        return queries.detach().cpu(), {name: value.item() for name, value in parts.items()}

    def gradients(self, batch: Batch, *, relevance_share: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Fill in the parameters' gradients, the same on every rank, scaled with `autocast: f16`; queries and parts of the loss."""
        self.optimizer.zero_grad(set_to_none=True)
        share = len(batch.rows) // self.world.size
        start, stop = self.world.rank * share, (self.world.rank + 1) * share
        if chunk := self.config.optim.cached_chunk:
            chunks = [slice(at, min(at + chunk, stop)) for at in range(start, stop, chunk)]
            queries, parts = self._backward_in_chunks(batch, chunks, relevance_share)
        else:
            whole = slice(start, stop)
            queries, loss, parts = self._loss(self._encode(batch, whole), batch, relevance_share, self._judged(batch, [whole]))
            self._scaler.scale(loss).backward()
        self.world.sum_gradients(self._parameters())
        return queries, parts

    def _parameters(self) -> Iterator[nn.Parameter]:
        return itertools.chain(self.model.parameters(), () if self._prompts is None else self._prompts.parameters())

    def _autocast(self) -> AbstractContextManager[object]:
        return nullcontext() if self._cast is None else torch.autocast(self._device.type, self._cast)

    def _encode(self, batch: Batch, part: slice) -> tuple[Tensor, ...]:
        """The fields of `QueryOutput`, what SPRC's auxiliary losses need of rows, the targets' tokens and, where there are any, the
        negatives' of some rows; float32, in which losses are computed whatever the cast."""
        data, rows = self._data, batch.rows[part]
        ids, mask = (t.to(self._device) for t in self._texts(torch.from_numpy(batch.read[part])))
        wanted = data.target[rows]
        if batch.negative is not None:
            wanted = np.concatenate([wanted, np.maximum(batch.negative[part], 0)])
        with self._autocast():
            fused = self.model.fuse_query(self._images(data.reference[rows]), ids, mask)
            made = list(self.model.compose_query(fused, mask))
            if self._prompts is not None:
                made += [self._prompts(self.model, ids, mask)] if self.config.loss.prompt_weight else []
                made.append(fused.fused_queries.mean(dim=1))
            made += self._images.targets(wanted).split(len(rows))
        return tuple(embedded.float() for embedded in made)

    @torch.no_grad()
    def _judged(self, batch: Batch, parts: Sequence[slice]) -> Tensor | None:
        """The guide's scores (B, B) of the whole batch, from its encodings of these parts of this rank's rows; None without a guide."""
        if self._guide is None:
            return None
        queries, targets = [], []
        for part in parts:
            rows = batch.rows[part]
            ids, mask = (t.to(self._device) for t in self._texts(torch.from_numpy(batch.read[part])))
            with self._autocast():
                queries.append(self._guide.encode_query(self._images(self._data.reference[rows]), ids, mask).query.float())
                targets.append(self._guide.encode_targets(self._images(self._data.target[rows])).float())
        return score(*self.world.gather(torch.cat(queries), torch.cat(targets)))

    def _loss(
        self, embedded: Sequence[Tensor], batch: Batch, relevance_share: float, guide: Tensor | None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Queries of the whole batch, its loss and the parts of that, from what `_encode` gives for this rank's rows."""
        gathered = iter(self.world.gather(*embedded))
        queries = QueryOutput(*itertools.islice(gathered, len(QueryOutput._fields)))
        prompted = None
        if self._prompts is not None:
            texts = next(gathered) if self.config.loss.prompt_weight else None
            prompted = Prompted(texts, next(gathered), self._prompts.tokens)
        targets = next(gathered)
        negatives = None
        if batch.negative is not None:
            negatives = next(gathered), torch.from_numpy(batch.negative >= 0).to(self._device)
        wanted = self._data.target[batch.rows]
        known = [wanted, self._data.labels[wanted], batch.named]
        if self._answers is not None:
            known.append(self._answers.among(batch.rows, wanted))
        labels = BatchLabels(*(torch.from_numpy(a).to(self._device) for a in known))
        loss, parts = total_loss(
            queries, targets, labels, self.config.loss,
            relevance_share=relevance_share, temperature=self._temperature(), negatives=negatives, guide=guide, prompted=prompted,
        )  # fmt: skip
        if not torch.isfinite(loss):
            raise CheckpointError(f"the loss is {loss.item()} at step {batch.step}; lower optim.learning_rate or check the data")
        return queries.query, loss, parts

    def _temperature(self) -> Tensor | float:
        """τ; its gradient, which every rank has in full, is shared out, since gradients are summed over ranks."""
        tau = self.model.temperature(self.config.loss.temperature)
        if isinstance(tau, float) or self.world.size == 1:
            return tau
        return tau.detach() + (tau - tau.detach()) / self.world.size

    def _backward_in_chunks(self, batch: Batch, chunks: Sequence[slice], relevance_share: float) -> tuple[Tensor, dict[str, Tensor]]:
        states, made = [], []
        with torch.no_grad():
            for chunk in chunks:
                states.append(random_state(self._device))
                made.append(self._encode(batch, chunk))
        leaves = tuple(torch.cat(parts).requires_grad_() for parts in zip(*made, strict=True))
        queries, loss, parts = self._loss(leaves, batch, relevance_share, self._judged(batch, chunks))
        self._scaler.scale(loss).backward()
        for chunk, state in zip(chunks, states, strict=True):
            restore_random_state(state, self._device)
            rows = slice(chunk.start - chunks[0].start, chunk.stop - chunks[0].start)
            again = [(e, leaf.grad[rows]) for e, leaf in zip(self._encode(batch, chunk), leaves, strict=True)
                     if e.requires_grad and leaf.grad is not None]  # fmt: skip
            torch.autograd.backward([e for e, _ in again], [gradient for _, gradient in again])
        return queries, parts

    def state(self) -> dict[str, Tensor]:
        """What resuming needs beside the optimiser: the scale of float16 gradients, nothing for other casts; and the prompt tokens."""
        scaler = self._scaler.state_dict()
        prompts = {} if self._prompts is None else {_PROMPTS: self._prompts.tokens.detach()}
        return prompts | ({"scaler": torch.tensor([scaler["scale"], scaler["_growth_tracker"]], dtype=torch.float64)} if scaler else {})

    def restore(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`."""
        if self._prompts is not None:
            with torch.no_grad():
                self._prompts.tokens.copy_(state[_PROMPTS])
        if "scaler" in state:
            scale, tracker = state["scaler"].tolist()
            self._scaler.load_state_dict(self._scaler.state_dict() | {"scale": scale, "_growth_tracker": int(tracker)})
