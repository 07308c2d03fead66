"""The DQE-CIR model on transformers' BLIP-2 modules: base query, attribute sub-queries and weights, target tokens."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import Blip2QFormerConfig, Blip2QFormerModel
from transformers.models.blip_2.modeling_blip_2 import Blip2TextEmbeddings

from dqe_engine.contracts.graphs import GraphSizes
from dqe_engine.contracts.vocabulary import AttributeVocabulary
from dqe_engine.errors import InputError

from ..config import ModelConfig
from .attributes import AttentionPool, AttributeHeads, compose
from .cross_attention import use_few_query_attention
from .second_pass import without_image
from .vision import build_vision

LEARNED_TEMPERATURE = (0.01, 0.5)
"""Bounds of a learned τ; the lower one is CLIP's."""


class FusedQuery(NamedTuple):
    """What the attribute heads read: fused query tokens (B, Q, H) and text tokens (B, L, H), and the words' embeddings (B, L, H)
    before fusion. `base_query` (B, D) is unit norm. Where it is "zero_shot", nothing is fused: the query tokens have seen the image
    alone, the text tokens the text."""

    base_query: Tensor
    fused_queries: Tensor
    fused_text: Tensor
    word_embeddings: Tensor


class AttributeReading(NamedTuple):
    """`sub_queries` (B, A, D) unit norm, `attribute_weights` (B, A), and `presence` (B, A), the logits that they come from."""

    sub_queries: Tensor
    attribute_weights: Tensor
    presence: Tensor


class QueryOutput(NamedTuple):
    """`query` (B, D) unit norm is what is searched with; the others explain it. `presence` (B, A) are logits."""

    query: Tensor
    base_query: Tensor
    sub_queries: Tensor
    attribute_weights: Tensor
    presence: Tensor


class DQEModel(nn.Module):
    """Vision tower, Q-Former with text input, two projections and the attribute heads. Sizes are configuration.

    Parameters have the names that BLIP-2 checkpoints give them. `vocab_size` is the tokenizer's, where the configuration
    names none. With `empty_vision`, the tower, which may hold a thousand million weights, is on the meta device: without
    values until a checkpoint is loaded. A vocabulary without attributes makes a model without attribute heads (A = 0); InputError where
    `config.attribute_weights` asks for them. While `checkpoint_activations` is set, training keeps only the inputs of the Q-Former's
    layers for the backward pass, which computes the rest again.
    """

    checkpoint_activations = False

    def __init__(
        self, config: ModelConfig, vocabulary: AttributeVocabulary, vocab_size: int, pad_id: int = 0, *, empty_vision: bool = False
    ) -> None:
        super().__init__()
        self.config = config
        self.vocabulary = vocabulary
        q = config.qformer
        qformer_config = Blip2QFormerConfig(
            vocab_size=q.vocab_size or vocab_size,
            hidden_size=q.hidden_size,
            num_hidden_layers=q.layers,
            num_attention_heads=q.heads,
            intermediate_size=q.mlp_width,
            hidden_act=q.activation,
            layer_norm_eps=q.layer_norm_eps,
            hidden_dropout_prob=q.dropout,
            attention_probs_dropout_prob=q.dropout,
            cross_attention_frequency=q.cross_attention_frequency,
            encoder_hidden_size=config.vision.hidden_size,
            max_position_embeddings=q.position_embeddings or q.max_text_length,
            pad_token_id=pad_id,
            use_qformer_text_input=True,
            attn_implementation="eager",  # exports best
        )
        with torch.device("meta") if empty_vision else nullcontext():
            self.vision_model = build_vision(config)
        self.embeddings = Blip2TextEmbeddings(qformer_config)
        self.query_tokens = nn.Parameter(torch.randn(1, q.query_tokens, q.hidden_size) * 0.02)
        self.qformer = Blip2QFormerModel(qformer_config)
        use_few_query_attention(self.qformer, q.query_tokens, self.sizes.image_tokens)
        self.vision_projection = nn.Linear(q.hidden_size, q.embedding_dim)
        self.text_projection = nn.Linear(q.hidden_size, q.embedding_dim)
        require_attributes(config, vocabulary)
        if vocabulary.attributes:
            self.attribute_heads = AttributeHeads(q.hidden_size, q.embedding_dim, len(vocabulary.attributes))
        if config.learned_temperature:
            self.temperature_log_scale = nn.Parameter(torch.zeros(()))
        for table in (self.embeddings.word_embeddings, self.embeddings.position_embeddings):
            nn.init.normal_(table.weight, std=0.02)
        # Drawn last: what a variant adds leaves the other weights of its seed as they are.
        if config.base_query == "pool":
            self.base_pool = AttentionPool(q.hidden_size, q.embedding_dim, 1)
        if config.base_query == "two_encoders":
            self.second_embeddings = Blip2TextEmbeddings(qformer_config)
            self.second_qformer = without_image(Blip2QFormerModel(qformer_config))
            for table in (self.second_embeddings.word_embeddings, self.second_embeddings.position_embeddings):
                nn.init.normal_(table.weight, std=0.02)
        if config.weights_from == "text+image" and vocabulary.attributes:
            self.attribute_heads.let_weights_see()
        if config.weights_from == "constant" and vocabulary.attributes:
            self.attribute_heads.keep_weights_constant()

    @property
    def sizes(self) -> GraphSizes:
        """What the exported graphs' shapes depend on."""
        c = self.config
        return GraphSizes(
            image_size=c.preprocessing.image_size,
            image_tokens=1 + (c.preprocessing.image_size // c.vision.patch_size) ** 2,
            vision_width=c.vision.hidden_size,
            embedding_dim=c.qformer.embedding_dim,
            target_tokens=1 if c.qformer.pooled else c.qformer.query_tokens,
            hidden_size=c.qformer.hidden_size,
            query_tokens=c.qformer.query_tokens,
            attributes=len(self.vocabulary.attributes),
        )

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, H, W) to image tokens (B, P, Hv) float32, whatever the tower's precision."""
        return self.vision_model(pixel_values).last_hidden_state.float()

    def _fuse(self, embedded: Tensor, image_tokens: Tensor, text_mask: Tensor | None) -> Tensor:
        """Q-Former encoder over (B or 1, Q [+ L], H), cross-attending from the first Q to the image tokens, to (B, Q [+ L], H)."""
        queries = self.query_tokens.shape[1]
        mask = None if text_mask is None else self._with_queries(text_mask)
        return self._encode(embedded, mask, image_tokens, queries)

    def _with_queries(self, text_mask: Tensor) -> Tensor:
        """The text's mask (B, L) as that of query and text tokens, (B, Q + L)."""
        return torch.cat([text_mask.new_ones(text_mask.shape[0], self.query_tokens.shape[1]), text_mask], dim=1)

    def _encode(
        self,
        embedded: Tensor,
        mask: Tensor | None,
        image_tokens: Tensor | None = None,
        queries: int = 0,
        *,
        qformer: Blip2QFormerModel | None = None,
    ) -> Tensor:
        """The embeddings' LayerNorm and the encoder of `qformer` (None: the first) over (B or 1, T, H), of which `mask` (B, T) says what
        is valid.

        The first `queries` positions cross-attend to the image tokens and go through the feed-forward layers of queries, all others
        through those of texts.
        """
        qformer = self.qformer if qformer is None else qformer
        hidden = qformer.dropout(qformer.layernorm(embedded))
        bias = None if mask is None else (1.0 - mask[:, None, None, :].to(hidden.dtype)) * -1e4  # (B, 1, 1, T)
        if self.checkpoint_activations and self.training:
            for layer in qformer.encoder.layer:  # what the encoder does
                hidden = checkpoint(layer, hidden, bias, image_tokens, query_length=queries, use_reentrant=False)
            return hidden
        return qformer.encoder(hidden, attention_mask=bias, encoder_hidden_states=image_tokens, query_length=queries).last_hidden_state

    def encode_sequence(self, embedded: Tensor, mask: Tensor) -> Tensor:
        """Text embeddings with positions (B, T, H), of which `mask` (B, T) says what is valid, without an image, to outputs (B, T, H)."""
        return self._encode(embedded, mask)

    def _see(self, image_tokens: Tensor) -> Tensor:
        """The query outputs (B, Q, H) of an image without a text."""
        queries: Tensor = self.query_tokens  # the same for all images, and so is what they do up to the first cross-attention
        if self.training and self.config.qformer.dropout:  # but for what is dropped
            queries = queries.expand(image_tokens.shape[0], -1, -1)
        return self._fuse(queries, image_tokens, None)

    def _as_targets(self, seen: Tensor) -> Tensor:
        """Query outputs (B, Q, H) to target tokens (B, M, D), unit norm each."""
        tokens = F.normalize(self.vision_projection(seen), dim=-1)  # (B, Q, D)
        return F.normalize(tokens.mean(dim=1, keepdim=True), dim=-1) if self.config.qformer.pooled else tokens

    def encode_targets(self, image_tokens: Tensor) -> Tensor:
        """Image tokens (B, P, Hv) to target tokens (B, M, D), unit norm each."""
        return self._as_targets(self._see(image_tokens))

    def fuse_query(self, image_tokens: Tensor, input_ids: Tensor, attention_mask: Tensor) -> FusedQuery:
        """Reference image tokens (B, P, Hv), `input_ids` and `attention_mask` (B, L) int64 through the Q-Former."""
        embedded = self.embeddings(input_ids)  # (B, L, H)
        words = self.embeddings.word_embeddings(input_ids)
        if self.config.base_query == "zero_shot":
            seen, read = self._see(image_tokens), self._encode(embedded, attention_mask)
            return FusedQuery(self._zero_shot(image_tokens, seen, read), seen, read, words)
        count = self.query_tokens.shape[1]
        queries = self.query_tokens.expand(image_tokens.shape[0], -1, -1)
        fused = self._fuse(torch.cat([queries, embedded], dim=1), image_tokens, attention_mask)  # (B, Q + L, H)
        base = self._base_query(fused, embedded, input_ids, attention_mask)
        return FusedQuery(base, fused[:, :count], fused[:, count:], words)

    def _base_query(self, fused: Tensor, embedded: Tensor, input_ids: Tensor, text_mask: Tensor) -> Tensor:
        """q0 (B, D) unit norm off the fused tokens (B, Q + L, H), as `config.base_query` says. `embedded` (B, L, H): the text's."""
        count, kind = self.query_tokens.shape[1], self.config.base_query
        if kind == "cls":
            return F.normalize(self.text_projection(fused[:, count]), dim=-1)
        if kind in ("two_pass", "two_encoders"):  # no image: no cross-attention, and query positions take the text's feed-forward layers
            own = kind == "two_encoders"
            text = self.second_embeddings(input_ids) if own else embedded
            qformer = self.second_qformer if own else self.qformer
            again = self._encode(torch.cat([fused[:, :count], text], dim=1), self._with_queries(text_mask), qformer=qformer)
            return F.normalize(self.text_projection(again[:, count]), dim=-1)
        mean = F.normalize(self.text_projection(fused[:, :count]).mean(dim=1), dim=-1)
        if kind == "mean":
            return mean
        return F.normalize(mean + self.base_pool.sub_queries(fused, self._with_queries(text_mask))[:, 0], dim=-1)

    def _zero_shot(self, image_tokens: Tensor, seen: Tensor, read: Tensor) -> Tensor:
        """q0 (B, D) unit norm: the image's embedding and the text's, each of which has not seen the other (`seen`, `read`).

        Image tokens that are all zeros stand for no image, and have no part.
        """
        share = self.config.text_share
        image = F.normalize(self._as_targets(seen).mean(dim=1), dim=-1)
        text = F.normalize(self.text_projection(read[:, 0]), dim=-1)
        there = image_tokens.abs().amax(dim=(1, 2)).sign()[:, None]  # (B, 1)
        return F.normalize((1 - share) * there * image + share * text, dim=-1)

    def temperature(self, initial: float) -> Tensor | float:
        """τ of the losses: `initial`, unless `learned_temperature`."""
        return initial * self.temperature_log_scale.exp() if self.config.learned_temperature else initial

    @torch.no_grad()
    def bound_temperature(self, initial: float) -> None:
        """Put a learned τ back within `LEARNED_TEMPERATURE`, after a step: a clamp in the forward pass would stop its gradient for good."""
        if self.config.learned_temperature:
            low, high = (math.log(bound / initial) for bound in LEARNED_TEMPERATURE)
            self.temperature_log_scale.clamp_(low, high)

    def read_attributes(
        self, fused_queries: Tensor, fused_text: Tensor, word_embeddings: Tensor, attention_mask: Tensor
    ) -> AttributeReading:
        """The attribute heads on the parts of a `FusedQuery`; `attention_mask` (B, L) int64 is the text's."""
        batch, count = fused_queries.shape[:2]
        if not self.config.attribute_weights:  # the baseline, or no attributes: the heads are neither used nor paid for
            absent = fused_queries.new_zeros(batch, len(self.vocabulary.attributes), self.config.qformer.embedding_dim)
            return AttributeReading(absent, absent[:, :, 0], absent[:, :, 0])
        mask = torch.cat([attention_mask.new_ones(batch, count), attention_mask], dim=1)
        pooled = self.attribute_heads.pool(torch.cat([fused_queries, fused_text], dim=1), mask)
        presence = self.attribute_heads.logits(word_embeddings, attention_mask, pooled)
        return AttributeReading(self.attribute_heads.project(pooled), self.attribute_heads.weights(presence), presence)

    def encode_query(self, image_tokens: Tensor, input_ids: Tensor, attention_mask: Tensor) -> QueryOutput:
        """Reference image tokens (B, P, Hv), `input_ids` and `attention_mask` (B, L) int64 to the composed query."""
        return self.compose_query(self.fuse_query(image_tokens, input_ids, attention_mask), attention_mask)

    def compose_query(self, fused: FusedQuery, attention_mask: Tensor) -> QueryOutput:
        """What `fuse_query` gives, with the attribute heads' reading, to the composed query."""
        read = self.read_attributes(fused.fused_queries, fused.fused_text, fused.word_embeddings, attention_mask)
        base = fused.base_query
        query = compose(base, read.sub_queries, read.attribute_weights) if self.config.attribute_weights else base
        return QueryOutput(query, base, *read)


def require_attributes(config: ModelConfig, vocabulary: AttributeVocabulary) -> None:
    """Raise InputError where the model is to weigh attributes, and there are none."""
    if config.attribute_weights and not vocabulary.attributes:
        raise InputError("the vocabulary names no attribute, so set model.attribute_weights=false, or give a vocabulary that names some")


def score(queries: Tensor, target_tokens: Tensor) -> Tensor:
    """MaxSim of every query against every item: (B, D) and (N, M, D) to (B, N); s = max over m of the inner product."""
    items, tokens, width = target_tokens.shape
    return (queries @ target_tokens.reshape(items * tokens, width).T).view(len(queries), items, tokens).amax(dim=-1)


def paired_score(queries: Tensor, target_tokens: Tensor) -> Tensor:
    """MaxSim of query i against item i: (B, D) and (B, M, D) to (B,)."""
    return torch.einsum("bd,bmd->bm", queries, target_tokens).amax(dim=-1)
