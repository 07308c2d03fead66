"""The Q-Former and the base queries in NumPy and float64, one question at a time, from the papers; none of the code that it checks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

F64 = NDArray[np.float64]
_erf = np.vectorize(math.erf, otypes=[float])


class SlowQFormer:
    """Reads the weights of a model by their names. `heads`, `epsilon`: of the Q-Former. Layers with cross-attention weights use them."""

    def __init__(self, state: Mapping[str, torch.Tensor], *, heads: int, epsilon: float) -> None:
        self.weights = {name: value.detach().double().numpy() for name, value in state.items() if not name.startswith("vision_model.")}
        self.heads, self.epsilon = heads, epsilon
        self.layers = 1 + max(int(name.split(".")[3]) for name in self.weights if name.startswith("qformer.encoder.layer."))

    def base_query(self, kind: str, image: F64, ids: list[int], *, text_share: float = 0.5, pooled: bool = False) -> F64:
        """(D,) of image tokens (P, Hv) and a text's ids without padding."""
        queries, text = self.weights["query_tokens"][0], self.text(ids)
        count = len(queries)
        if kind == "zero_shot":
            tokens = _unit(self.linear("vision_projection", self.encode(queries, image, count)))
            tokens = _unit(tokens.mean(axis=0))[None] if pooled else tokens
            seen, read = _unit(tokens.mean(axis=0)), _unit(self.linear("text_projection", self.encode(text))[0])
            return _unit(text_share * read + (1 - text_share) * (seen if image.any() else 0 * seen))
        fused = self.encode(np.concatenate([queries, text]), image, count)
        if kind == "mean":
            return _unit(np.mean([self.linear("text_projection", output) for output in fused[:count]], axis=0))
        if kind == "cls":
            return _unit(self.linear("text_projection", fused[count]))
        assert kind in ("two_pass", "two_encoders")
        second = "second_" if kind == "two_encoders" else ""
        # No image, and no positions that count as queries.
        again = self.encode(np.concatenate([fused[:count], self.text(ids, second)]), of=f"{second}qformer")
        return _unit(self.linear("text_projection", again[count]))

    def text(self, ids: list[int], of: str = "") -> F64:
        """(L, H): words and positions."""
        words, positions = (self.weights[f"{of}embeddings.{table}_embeddings.weight"] for table in ("word", "position"))
        return np.stack([words[id] + positions[at] for at, id in enumerate(ids)])

    def encode(self, tokens: F64, image: F64 | None = None, queries: int = 0, of: str = "qformer") -> F64:
        """(T, H) to the same; the first `queries` look at the image and have feed-forward layers of their own."""
        hidden = self.norm(f"{of}.layernorm", tokens)
        for at in range(self.layers):
            layer = f"{of}.encoder.layer.{at}"
            hidden = self.attend(f"{layer}.attention", hidden, hidden)
            if image is not None and f"{layer}.crossattention.attention.query.weight" in self.weights:
                hidden = np.concatenate([self.attend(f"{layer}.crossattention", hidden[:queries], image), hidden[queries:]])
            parts = [self.feed(layer, hidden[:queries], "_query")] if queries else []
            hidden = np.concatenate([*parts, self.feed(layer, hidden[queries:], "")])
        return hidden

    def attend(self, name: str, queries: F64, tokens: F64) -> F64:
        q, k, v = (self.linear(f"{name}.attention.{part}", x) for part, x in (("query", queries), ("key", tokens), ("value", tokens)))
        width = q.shape[1] // self.heads
        seen = np.zeros_like(q)
        for head in range(self.heads):
            part = slice(head * width, (head + 1) * width)
            for row in range(len(q)):
                scores = k[:, part] @ q[row, part] / math.sqrt(width)
                share = np.exp(scores - scores.max())
                seen[row, part] = (share / share.sum()) @ v[:, part]
        return self.norm(f"{name}.output.LayerNorm", self.linear(f"{name}.output.dense", seen) + queries)

    def feed(self, layer: str, tokens: F64, kind: str) -> F64:
        inside = self.linear(f"{layer}.intermediate{kind}.dense", tokens)
        inside = inside * 0.5 * (1 + _erf(inside / math.sqrt(2))) if inside.size else inside
        return self.norm(f"{layer}.output{kind}.LayerNorm", self.linear(f"{layer}.output{kind}.dense", inside) + tokens)

    def linear(self, name: str, x: F64) -> F64:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def norm(self, name: str, x: F64) -> F64:
        centred = x - x.mean(axis=-1, keepdims=True)
        scale = np.sqrt((centred**2).mean(axis=-1, keepdims=True) + self.epsilon)
        return centred / scale * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]


def slow_qformer(model: Any) -> SlowQFormer:
    """Of a `DQEModel`."""
    return SlowQFormer(model.state_dict(), heads=model.config.qformer.heads, epsilon=model.config.qformer.layer_norm_eps)


def slow_base_queries(model: Any, tokens: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> F64:
    """(B, D), each row by itself, by the configuration of `model`."""
    slow, config = slow_qformer(model), model.config
    options = {"text_share": config.text_share, "pooled": config.qformer.pooled}
    rows = zip(tokens.double().numpy(), ids, mask.bool(), strict=True)
    return np.stack([slow.base_query(config.base_query, image, row[valid].tolist(), **options) for image, row, valid in rows])


def _unit(vectors: F64) -> F64:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=-1, keepdims=True))
