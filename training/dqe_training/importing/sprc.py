"""SPRC (ICLR 2024), and SPN4CIR (ACM MM 2024), which trains SPRC's class: `{"epoch": n, "<class name>": state_dict}`."""

from __future__ import annotations

from .formats import Layout, is_lavis_like

_UNUSED = {"prompt_tokens": "SPRC's prompt tokens, which only a loss of its training reads"}

LAYOUT = Layout(
    name="sprc",
    title="SPRC's Blip2QformerCirAlignPrompt",
    licence="chunmeifeng/SPRC names no licence for its weights (as of 2026-11); ask its authors before you use them for more than research",
    is_this=lambda file: is_lavis_like(file) and (file.wrapper not in ("", "model") or "prompt_tokens" in file.tensors),
    unused=_UNUSED,
)
SPN4CIR = Layout(
    name="spn4cir",
    title="SPN4CIR's Blip2QformerCirAlignPrompt",
    licence="BUAADreamer/SPN4CIR is MIT; the class is that of chunmeifeng/SPRC, which names no licence for its weights (as of 2026-11)",
    is_this=lambda file: False,  # SPRC's keys in SPRC's form: taken for that, but for --format
    unused=_UNUSED,
)
