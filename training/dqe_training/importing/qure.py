"""QuRe (ICML 2025): the bare `state_dict` of `Blip2QuRe`."""

from __future__ import annotations

from .formats import Layout, is_lavis_like

LAYOUT = Layout(
    name="qure",
    title="QuRe's Blip2QuRe",
    licence="jackwaky/QuRe names no licence for its weights (as of 2026-11); ask its authors before you use them for more than research",
    queries="mean",
    is_this=lambda file: file.wrapper == "" and is_lavis_like(file) and "prompt_tokens" not in file.tensors,
)
