"""The losses, written out in loops over float64, and the random batches that both sides get."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def cosines(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1


def repeated_targets(batch: int) -> Tensor:
    """Some rows share their target image."""
    return torch.arange(batch) // 2 * 2 % max(batch - 1, 1)


def reference_relevance(similarity: np.ndarray, share: float, temperature: float, ignore: np.ndarray) -> np.ndarray:
    batch = len(similarity)
    result = np.zeros((batch, batch))
    for i in range(batch):
        mass = [0.0 if ignore[i, j] or i == j else math.exp(similarity[i, j] / temperature) for j in range(batch)]
        for j in range(batch):
            result[i, j] = (share * mass[j] / sum(mass) + (1 - share) * (i == j)) if sum(mass) else float(i == j)
    return result


def reference_log_q(scores: np.ndarray, i: int, temperature: float, ignore: np.ndarray) -> dict[int, float]:
    kept = [j for j in range(len(scores)) if not ignore[i, j]]
    total = math.log(sum(math.exp(scores[i, j] / temperature) for j in kept))
    return {j: scores[i, j] / temperature - total for j in kept}


def reference_kl(scores: np.ndarray, relevance: np.ndarray, temperature: float, ignore: np.ndarray) -> float:
    total = 0.0
    for i in range(len(scores)):
        for j, log_q in reference_log_q(scores, i, temperature, ignore).items():
            if relevance[i, j] > 0:
                total += relevance[i, j] * (math.log(relevance[i, j]) - log_q)
    return total / len(scores)


def reference_infonce(scores: np.ndarray, temperature: float, ignore: np.ndarray) -> float:
    return float(np.mean([-reference_log_q(scores, i, temperature, ignore)[i] for i in range(len(scores))]))


def reference_ranking(positive: np.ndarray, negative: np.ndarray, valid: np.ndarray, temperature: float) -> float:
    losses = [math.log(1 + math.exp((n - p) / temperature)) for p, n, v in zip(positive, negative, valid, strict=True) if v]
    return sum(losses) / len(losses) if losses else 0.0


def reference_attribute_margin(sub_scores: np.ndarray, labels: np.ndarray, named: np.ndarray, margin: float) -> float:
    losses = []
    batch, attributes = labels.shape
    for i in range(batch):
        for a in range(attributes):
            if not named[i, a] or labels[i, a] < 0:
                continue
            others = [sub_scores[i, a, j] for j in range(batch) if labels[j, a] >= 0 and labels[j, a] != labels[i, a]]
            if others:
                losses.append(max(0.0, margin - sub_scores[i, a, i] + max(others)))
    return sum(losses) / len(losses) if losses else 0.0


def reference_presence(logits: np.ndarray, named: np.ndarray) -> float:
    p = 1 / (1 + np.exp(-logits))
    return float(-np.where(named, np.log(p), np.log(1 - p)).mean())
