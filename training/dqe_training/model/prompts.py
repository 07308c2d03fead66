"""SPRC's prompt tokens: learned tokens that stand in a text for the image. They train beside the model and are no part of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .dqe import DQEModel

STD = 0.02
"""Of the initial values: BERT's, and SPRC's."""


class PromptTokens(nn.Module):
    """As many tokens (Q, H) as the model has query tokens, drawn from `seed` alone, so that what else a training draws stays what it is.

    A search never needs them, so a finished checkpoint has none; those of a run that goes on are in its state.
    """

    def __init__(self, model: DQEModel, *, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        drawn = STD * torch.randn(model.query_tokens.shape[1:], generator=generator)
        self.tokens = nn.Parameter(drawn.to(model.query_tokens.device))

    def forward(self, model: DQEModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The prompted text's embedding (B, D), unit norm, of `input_ids` and `attention_mask` (B, L) int64.

        The tokens stand after the text's [CLS] and before its other words; positions count all of them. No image: no cross-attention, and
        all positions go through the text's feed-forward layers. The output at [CLS] is projected as a text is.
        """
        embeddings = model.embeddings
        words = embeddings.word_embeddings(input_ids)  # (B, L, H)
        prompts = self.tokens.expand(len(words), -1, -1)  # (B, Q, H)
        sequence = torch.cat([words[:, :1], prompts, words[:, 1:]], dim=1)  # (B, Q + L, H)
        sequence = sequence + embeddings.position_embeddings.weight[: sequence.shape[1]]
        ones = attention_mask.new_ones(prompts.shape[:2])
        read = model.encode_sequence(sequence, torch.cat([attention_mask[:, :1], ones, attention_mask[:, 1:]], dim=1))
        return F.normalize(model.text_projection(read[:, 0]), dim=-1)
