"""SPRC (ICLR 2024): `{"epoch": n, "<class name>": state_dict}`."""

from __future__ import annotations

from .formats import Layout, is_lavis_like

UNUSED = {"prompt_tokens": "SPRC's prompt tokens, which only a loss of its training reads"}

LAYOUT = Layout(
    name="sprc",
    title="SPRC's Blip2QformerCirAlignPrompt",
    licence="chunmeifeng/SPRC names no licence for its weights (as of 2026-11); ask its authors before you use them for more than research",
    queries="two_pass",
    is_this=lambda file: is_lavis_like(file) and (file.wrapper not in ("", "model") or "prompt_tokens" in file.tensors),
    unused=UNUSED,
)
