"""TRNS refreshes and the serving zones: what is mined from the queries and the gallery as the model sees them."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dqe_engine.contracts.parsing import parse_json, to_json
from dqe_engine.contracts.zones import ZoneSpec
from dqe_engine.zones.mining import MiningJob, mine_negatives

from ..config import TRNSConfig
from ..data.triplets import TextBatcher, TripletData
from ..distributed import World
from ..encoding import TrainingImages, encode_queries
from ..model import DQEModel
from .drawing import draw_negative, draw_random, mix_seeds
from .serving_zones import calibrate_zones
from .two_drops import two_drop_negatives

_CALIBRATION_QUERIES = 2_000
SHARED_BLOCK = 1024
"""Queries of a block that a rank mines; smaller than a single process would take, so that few queries occupy many ranks."""


class Negatives:
    """Mined negatives of every triplet.

    A refresh embeds every query as the model is then, in evaluation mode: the embeddings that training steps made would be older by
    up to an epoch, with dropout and in the step's precision, and mining would depend on which half of an epoch made which.
    `seed`: the training's, on which it depends what is mined and drawn. Ranks of `world` share encoding and mining, and all have the
    result. They cut the work where one process does, so the same embeddings give the same negatives, to the id.
    """

    def __init__(
        self,
        model: DQEModel,
        config: TRNSConfig,
        data: TripletData,
        texts: TextBatcher,
        images: TrainingImages,
        world: World,
        *,
        seed: int,
    ) -> None:
        self._model, self._config, self._world, self._seed = model, config, world, seed
        self._data, self._texts, self._images = data, texts, images
        self._mined: NDArray[np.int64] | None = None

    def draw(self, rows: NDArray[np.int64], epoch: int) -> NDArray[np.int64] | None:
        """One negative (B,) for each of `rows`, -1 where none was mined; before the first refresh None, or random ones."""
        if self._mined is not None:
            return draw_negative(self._mined, rows, seed=self._seed, epoch=epoch)
        if self._config.warmup == "none":
            return None
        data = self._data
        barred = np.column_stack([data.target[rows], data.excluded[rows]])
        return draw_random(len(data.images), barred, rows, seed=self._seed, epoch=epoch)

    @property
    def mined(self) -> NDArray[np.int64] | None:
        """(T, P): the negatives of the last refresh, positions of `data.images`, padded with -1; None before the first."""
        return self._mined

    def embeddings(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Queries (B, D) of the triplets `rows` and target tokens (I, M, D) of all images, of the model as it is."""
        tokens = self._images.all_targets()
        return self._encode(rows).numpy(), tokens

    def due(self, epoch: int) -> bool:
        t = self._config
        return t.enabled and epoch >= t.warmup_epochs and (epoch - t.warmup_epochs) % t.interval == 0

    def refresh(self, epoch: int) -> dict[str, Any]:
        """Mine for every query; what there is to log."""
        config, seed = self._config, mix_seeds(self._config.zones.seed, self._seed, epoch)
        queries, tokens = self.embeddings(np.arange(len(self._data)))
        if config.rule == "two-drops":
            found = self._world.from_main(lambda: self._between_drops(queries, tokens, seed).tobytes())
            self._mined = np.frombuffer(found, np.int64).reshape(len(self._data), config.picks).copy()
            return {"empty": float((self._mined[:, 0] < 0).mean())}
        zones = msgspec.structs.replace(config.zones, seed=seed)
        self._mined, applied = mine_shared(queries, tokens, self._data, zones=zones, picks=config.picks, world=self._world)
        bounds = {"lo": applied.lo, "hi": applied.hi} if zones.bounds == "pooled" else {}
        return {"empty": float((self._mined[:, 0] < 0).mean()), **bounds}

    def _between_drops(self, queries: NDArray[np.float32], tokens: NDArray[np.float32], seed: int) -> NDArray[np.int64]:
        """Made by the main rank alone: a rival to compare with, not meant for large galleries."""
        data = self._data
        return two_drop_negatives(queries, tokens, data.target, picks=self._config.picks, seed=seed, exclude=data.excluded)

    def calibrate(self, seed: int) -> ZoneSpec:
        """Serving zones, read off a sample of the training set by the main rank, which tells the others."""
        rows = np.random.default_rng(seed).permutation(len(self._data))[:_CALIBRATION_QUERIES]
        queries, tokens = self.embeddings(rows)
        data = self._data
        told = self._world.from_main(lambda: to_json(calibrate_zones(queries, tokens, data.target[rows], data.reference[rows])))
        return parse_json(ZoneSpec, told, where="serving zones")

    def _encode(self, rows: NDArray[np.int64]) -> Tensor:
        return encode_queries(self._model, self._images, self._texts, self._data.reference[rows], rows, self._world)

    def state(self) -> dict[str, Tensor]:
        """What resuming needs."""
        return {} if self._mined is None else {"mined": torch.from_numpy(self._mined)}

    def restore(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`."""
        self._mined = state["mined"].numpy() if "mined" in state else None


def mine_shared(
    queries: NDArray[np.float32],
    tokens: NDArray[np.float32],
    data: TripletData,
    *,
    zones: ZoneSpec,
    picks: int,
    world: World,
    block: int = SHARED_BLOCK,
) -> tuple[NDArray[np.int64], ZoneSpec]:
    """Negatives (T, P) as `mine_negatives` picks them for all triplets, whole blocks of queries mined by each rank; and the zones
    that applied, whose bounds are absolute where `zones` has pooled ones.

    queries: (T, D), tokens: (I, M, D) of the gallery, both the same on every rank. `data.excluded` are no candidates.
    """
    if zones.bounds == "pooled":  # by the main rank: others may add in another order, and bounds must be the same to the bit
        job = MiningJob(queries=queries, items=tokens, targets=data.target, zones=zones, picks=picks, exclude=data.excluded)
        zones = parse_json(ZoneSpec, world.from_main(lambda: to_json(job.applied_zones)), where="zones")
    found = np.full((len(data), picks), -1, np.int64)
    mine = world.rows(len(data), block)
    if mine:
        mined = mine_negatives(
            queries, tokens, data.target, zones=zones, picks=picks, exclude=data.excluded, block=block, threads=world.threads, rows=mine
        )
        found[mine.start : mine.stop] = mined.picks
    world.complete(torch.from_numpy(found), block)
    return found, zones
