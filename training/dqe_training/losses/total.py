"""The weighted sum L = L_objective + rank L_rank + attribute L_attr + presence L_presence, and SPRC's two (docs/method.md, equation 11)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..config import LossConfig
from ..model.dqe import QueryOutput, paired_score, score
from .alignment import alignment_loss
from .attribute_margin import attribute_margin_loss
from .infonce import infonce_loss
from .kl_relevance import kl_relevance_loss, relevance_distribution, relevance_figures, same_target
from .margin_filter import suspected_positives
from .presence import presence_loss
from .ranking import margin_ranking_loss, ranking_loss


class BatchLabels(NamedTuple):
    """What a batch knows beside its embeddings: target image ids (B,), labels (B, A) int64, named (B, A) bool, and, where the dataset
    tells, valid (B, B) bool: whether row j's target answers row i."""

    target_ids: Tensor
    labels: Tensor
    named: Tensor
    valid: Tensor | None = None


class Prompted(NamedTuple):
    """What SPRC's auxiliary losses read: `texts` (B, D) unit norm, the prompted texts' embeddings (`PromptTokens`), None where the loss on
    them has no weight; `fused` (B, H), the means of the fused query tokens; and the `prompts` (Q, H)."""

    texts: Tensor | None
    fused: Tensor
    prompts: Tensor


def total_loss(
    output: QueryOutput,
    target_tokens: Tensor,
    labels: BatchLabels,
    config: LossConfig,
    *,
    relevance_share: float,
    temperature: float | Tensor | None = None,
    negatives: tuple[Tensor, Tensor] | None = None,
    guide: Tensor | None = None,
    prompted: Prompted | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and its parts (unweighted, detached), with figures of the relevance distribution as `relevance/...`, and as `filter/dropped`
    the share of the in-batch negatives that the margin filter left out.

    `target_tokens` (B, M, D). `negatives` is (tokens (B, M, D), valid (B,) bool) of one TRNS negative per row.
    `relevance_share` 0 makes the KL loss the contrastive one, which is how training starts. `temperature`, where it is learned, is
    in place of the configuration's. `guide` (B, B): scores that the margin filter judges by, where they are not the model's own.
    `prompted`: for SPRC's auxiliary losses; without, there are none, whatever their weights. A model without attributes has no loss on
    them, whatever their weights.
    """
    tau = config.temperature if temperature is None else temperature
    scores = score(output.query, target_tokens)  # (B, B)
    ignore = same_target(labels.target_ids)
    parts: dict[str, Tensor] = {}
    figures: dict[str, Tensor] = {}
    if config.filter != "off":
        dropped = suspected_positives(scores if guide is None else guide, strategy=config.filter, margin=config.filter_margin)
        others = ~ignore.fill_diagonal_(True)
        figures["filter/dropped"] = (dropped & others).sum() / others.sum().clamp_min(1)
        ignore = (dropped | ignore).fill_diagonal_(False)
    total = scores.new_zeros(())
    if config.objective == "pairwise":  # the ranking loss below
        pass
    elif config.objective == "infonce" or relevance_share == 0:
        parts[config.objective] = infonce_loss(scores, temperature=tau, ignore=ignore)
    else:
        pooled = F.normalize(target_tokens.mean(dim=1), dim=-1)
        similarity = pooled @ pooled.T if config.relevance_spread == "similarity" else torch.zeros_like(scores)
        relevance = relevance_distribution(similarity, share=relevance_share, temperature=config.relevance_temperature, ignore=ignore)
        figures |= {f"relevance/{name}": value for name, value in relevance_figures(relevance, labels.valid).items()}
        parts["kl"] = kl_relevance_loss(scores, relevance, temperature=tau, ignore=ignore)
    total = total + sum(parts.values())
    if negatives is not None and config.rank_weight:
        tokens, drawn = negatives
        positive, negative = scores.diagonal(), paired_score(output.query, tokens)
        if config.ranking == "margin":
            parts["rank"] = margin_ranking_loss(positive, negative, drawn, margin=config.rank_margin)
        else:
            parts["rank"] = ranking_loss(positive, negative, drawn, temperature=tau)
        total = total + config.rank_weight * parts["rank"]
    batch, attributes, width = output.sub_queries.shape
    if config.attribute_weight and attributes:
        sub_scores = score(output.sub_queries.reshape(-1, width), target_tokens).view(batch, attributes, batch)
        parts["attribute"] = attribute_margin_loss(sub_scores, labels.labels, labels.named, margin=config.attribute_margin)
        total = total + config.attribute_weight * parts["attribute"]
    if config.presence_weight and attributes:
        parts["presence"] = presence_loss(output.presence, labels.named)
        total = total + config.presence_weight * parts["presence"]
    if prompted is not None and prompted.texts is not None and config.prompt_weight:
        parts["prompt"] = infonce_loss(score(prompted.texts, target_tokens), temperature=tau, ignore=ignore)
        total = total + config.prompt_weight * parts["prompt"]
    if prompted is not None and config.align_weight:
        parts["align"] = alignment_loss(prompted.fused, prompted.prompts)
        total = total + config.align_weight * parts["align"]
    told = parts | {"total": total} | figures
    return total, {name: part.detach() for name, part in told.items()}
