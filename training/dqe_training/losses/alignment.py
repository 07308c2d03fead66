"""SPRC's alignment (arXiv 2310.05473; public code): the fused query tokens are drawn to the mean of the prompt tokens."""

from __future__ import annotations

from torch import Tensor


def alignment_loss(fused: Tensor, prompts: Tensor) -> Tensor:
    """The mean over batch and width of (fused - mean of the prompts)², the second half of SPRC's auxiliary losses.

    The prompts get no gradient from it, so in itself it draws all fused means to one point, whatever image and text are: it regularises.
    What the prompts mean comes from the prompted text's contrast, in which they train (`PromptTokens`).

    Args:
        fused: (B, H), the mean over the fused query tokens of the first pass, before any projection.
        prompts: (Q, H), the prompt tokens; the target is their mean.
    """
    return (fused - prompts.detach().mean(dim=0)).square().mean()
