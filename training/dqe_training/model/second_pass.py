"""The Q-Former of a second pass over a query's own outputs, where it is not the first's (SPN4CIR): it never sees an image."""

from __future__ import annotations

from transformers import Blip2QFormerModel


def without_image(qformer: Blip2QFormerModel) -> Blip2QFormerModel:
    """`qformer` without the layers that a pass without an image never runs: cross-attention, and the feed-forward layers of queries."""
    for layer in qformer.encoder.layer:
        if layer.has_cross_attention:
            layer.has_cross_attention = False
            del layer.crossattention
        del layer.intermediate_query, layer.output_query
    return qformer
