"""Files of the published layouts with random weights at any size, and what their models compute, written down slowly and plainly.

The names are those of LAVIS's classes. `reference` shares no line with the model that is imported into: no module, one image and one head
at a time where it matters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

State = dict[str, Tensor]


@dataclass(frozen=True)
class Size:
    """`kind` of tower: "eva" or "clip". The defaults are the smallest with every part; `VIT_G` and `VIT_L` are the published ones."""

    kind: str = "eva"
    width: int = 24
    depth: int = 2
    heads: int = 4
    mlp: int = 40
    patch: int = 4
    image: int = 12
    words: int = 40
    hidden: int = 16
    layers: int = 3
    qformer_heads: int = 2
    qformer_mlp: int = 36
    positions: int = 40
    queries: int = 3
    joint: int = 8


TINY = {"eva": Size(), "clip": Size(kind="clip")}
_BERT = {
    "words": 30523, "hidden": 768, "layers": 12, "qformer_heads": 12, "qformer_mlp": 3072, "positions": 512, "queries": 32, "joint": 256,
}  # fmt: skip
VIT_G = Size(kind="eva", width=1408, depth=39, heads=16, mlp=6144, patch=14, image=224, **_BERT)
VIT_G_COCO = Size(kind="eva", width=1408, depth=39, heads=16, mlp=6144, patch=14, image=364, **_BERT)
VIT_L = Size(kind="clip", width=1024, depth=23, heads=16, mlp=4096, patch=14, image=224, **_BERT)


def tower_shapes(s: Size) -> dict[str, tuple[int, ...]]:
    """Names without a prefix, as a tower's own file has them."""
    w, tokens = s.width, 1 + (s.image // s.patch) ** 2
    if s.kind == "eva":
        shapes: dict[str, tuple[int, ...]] = {
            "cls_token": (1, 1, w), "pos_embed": (1, tokens, w), "patch_embed.proj.weight": (w, 3, s.patch, s.patch),
            "patch_embed.proj.bias": (w,),
        }  # fmt: skip
    else:
        shapes = {
            "class_embedding": (w,), "positional_embedding": (tokens, w), "conv1.weight": (w, 3, s.patch, s.patch), "ln_pre.weight": (w,),
            "ln_pre.bias": (w,),
        }  # fmt: skip
    for n in range(s.depth):
        if s.kind == "eva":
            b = f"blocks.{n}."
            shapes |= {f"{b}attn.q_bias": (w,), f"{b}attn.v_bias": (w,), f"{b}attn.qkv.weight": (3 * w, w)}
            names = {"norm1": (w,), "norm2": (w,), "attn.proj": (w, w), "mlp.fc1": (s.mlp, w), "mlp.fc2": (w, s.mlp)}
        else:
            b = f"transformer.resblocks.{n}."
            shapes |= {f"{b}attn.in_proj_weight": (3 * w, w), f"{b}attn.in_proj_bias": (3 * w,)}
            names = {"ln_1": (w,), "ln_2": (w,), "attn.out_proj": (w, w), "mlp.c_fc": (s.mlp, w), "mlp.c_proj": (w, s.mlp)}
        for name, shape in names.items():
            shapes |= {f"{b}{name}.weight": shape, f"{b}{name}.bias": shape[:1]}
    return shapes


def qformer_shapes(s: Size) -> dict[str, tuple[int, ...]]:
    """Everything but the tower, what no search needs included."""
    h, b = s.hidden, "Qformer.bert."
    shapes: dict[str, tuple[int, ...]] = {
        "query_tokens": (1, s.queries, h), "temp": (), "ln_vision.weight": (s.width,), "ln_vision.bias": (s.width,),
        f"{b}embeddings.word_embeddings.weight": (s.words, h), f"{b}embeddings.position_embeddings.weight": (s.positions, h),
    }  # fmt: skip
    pairs: dict[str, tuple[int, ...]] = {
        f"{b}embeddings.LayerNorm": (h,), "vision_proj": (s.joint, h), "text_proj": (s.joint, h), "itm_head": (2, h),
        "Qformer.cls.predictions.decoder": (s.words, h), "Qformer.cls.predictions.transform.dense": (h, h),
        "Qformer.cls.predictions.transform.LayerNorm": (h,),
    }  # fmt: skip
    for n in range(s.layers):
        layer = f"{b}encoder.layer.{n}."
        for part in ("attention", "crossattention") if n % 2 == 0 else ("attention",):
            read = s.width if part == "crossattention" else h
            pairs |= {f"{layer}{part}.self.query": (h, h), f"{layer}{part}.self.key": (h, read), f"{layer}{part}.self.value": (h, read)}
            pairs |= {f"{layer}{part}.output.dense": (h, h), f"{layer}{part}.output.LayerNorm": (h,)}
        for end in ("", "_query"):
            pairs |= {f"{layer}intermediate{end}.dense": (s.qformer_mlp, h), f"{layer}output{end}.dense": (h, s.qformer_mlp)}
            pairs[f"{layer}output{end}.LayerNorm"] = (h,)
    for name, shape in pairs.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def shapes_of(layout: str, s: Size) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a whole file: "lavis", "sprc", "spn4cir" or "qure"."""
    shapes = {f"visual_encoder.{name}": shape for name, shape in tower_shapes(s).items()} | qformer_shapes(s)
    if layout in ("sprc", "spn4cir"):
        shapes["prompt_tokens"] = (1, s.queries, s.hidden)
    if layout == "spn4cir":  # a second Q-Former and projection of the same form
        shapes |= {name.replace("Qformer.", "Qformer_query."): shape for name, shape in shapes.items() if name.startswith("Qformer.")}
        shapes |= {"text_proj_q.weight": (s.joint, s.hidden), "text_proj_q.bias": (s.joint,)}
    return shapes


def random_state(shapes: Mapping[str, tuple[int, ...]], *, seed: int = 0, half_tower: bool = False) -> State:
    """Values large enough that every tensor matters. `half_tower`: its matrices in float16, as LAVIS holds them."""
    generator = torch.Generator().manual_seed(seed)
    state: State = {}
    for name, shape in shapes.items():
        std = 1.2 * shape[-1] ** -0.5 if len(shape) >= 2 else 0.3
        value = torch.randn(shape, generator=generator) * std
        if name.endswith("weight") and len(shape) == 1:
            value = value + 1
        halved = half_tower and name.startswith("visual_encoder.") and len(shape) >= 2 and "embed." not in name.replace("patch_embed.", "")
        state[name] = value.half() if halved else value
    return state


def wrapped(layout: str, state: State) -> object:
    """As the authors save it."""
    if layout == "spn4cir":
        return {"epoch": 7, "state_dict": {f"blip_model.{name}": value for name, value in state.items()}}
    return {"lavis": {"model": state}, "sprc": {"epoch": 7, "Blip2QformerCirAlignPrompt": state}, "qure": state}[layout]


def save(layout: str, path: Path, size: Size, *, seed: int = 0, half_tower: bool = False) -> State:
    """Write a file of that layout; returns its tensors."""
    state = random_state(shapes_of(layout, size), seed=seed, half_tower=half_tower)
    torch.save(wrapped(layout, state), path)
    return state


def words(count: int) -> list[str]:
    """A vocabulary of BERT's form: `count` tokens, of which `[DEC]`, the last row of a table, is none."""
    plain = ["is", "red", "blue", "has", "stripes", "make", "it", "longer", "and", "the", "same", "but", "with", ",", "in", "a"]
    return [*("[PAD]", "[UNK]", "[CLS]", "[SEP]"), *plain, *(f"##{n}" for n in range(count - 4 - len(plain)))]


def write_vocabulary(path: Path, rows: int) -> Path:
    """vocab.txt for an embedding table of `rows`, the last of which is `[DEC]`'s."""
    path.write_text("".join(f"{word}\n" for word in words(rows - 1)))
    return path


# -- what the models compute -----------------------------------------------------------------------------------------------


def _norm(x: Tensor, state: State, name: str, eps: float) -> Tensor:
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    return (x - mean) / (variance + eps).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]


def _linear(x: Tensor, state: State, name: str) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def _gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def _attend(q: Tensor, k: Tensor, v: Tensor, heads: int, seen: Tensor | None = None) -> Tensor:
    """(T, W) queries over (S, W) keys and values, head by head; `seen` (S,): which keys there are."""
    size, found = q.shape[-1] // heads, []
    for n in range(heads):
        part = slice(n * size, (n + 1) * size)
        scores = q[:, part] @ k[:, part].T / math.sqrt(size)
        if seen is not None:
            scores = scores.masked_fill(~seen, -math.inf)
        found.append(scores.softmax(-1) @ v[:, part])
    return torch.cat(found, -1)


def image_tokens(state: State, s: Size, pixels: Tensor) -> Tensor:
    """(3, H, W) to (P, width), through `ln_vision`."""
    p, side = "visual_encoder.", s.image // s.patch
    patches = pixels.reshape(3, side, s.patch, side, s.patch).permute(1, 3, 0, 2, 4).reshape(side * side, -1)
    if s.kind == "eva":
        x = patches @ state[f"{p}patch_embed.proj.weight"].reshape(s.width, -1).T + state[f"{p}patch_embed.proj.bias"]
        x = torch.cat([state[f"{p}cls_token"][0], x]) + state[f"{p}pos_embed"][0]
    else:
        x = torch.cat([state[f"{p}class_embedding"][None], patches @ state[f"{p}conv1.weight"].reshape(s.width, -1).T])
        x = _norm(x + state[f"{p}positional_embedding"], state, f"{p}ln_pre", 1e-5)
    for n in range(s.depth):
        if s.kind == "eva":
            b = f"{p}blocks.{n}."
            y = _norm(x, state, f"{b}norm1", 1e-6)
            q, k, v = (y @ part.T for part in state[f"{b}attn.qkv.weight"].chunk(3))
            q, v = q + state[f"{b}attn.q_bias"], v + state[f"{b}attn.v_bias"]
            x = x + _linear(_attend(q, k, v, s.heads), state, f"{b}attn.proj")
            x = x + _linear(_gelu(_linear(_norm(x, state, f"{b}norm2", 1e-6), state, f"{b}mlp.fc1")), state, f"{b}mlp.fc2")
        else:
            b = f"{p}transformer.resblocks.{n}."
            y = _norm(x, state, f"{b}ln_1", 1e-5) @ state[f"{b}attn.in_proj_weight"].T + state[f"{b}attn.in_proj_bias"]
            x = x + _linear(_attend(*y.chunk(3, -1), s.heads), state, f"{b}attn.out_proj")
            y = _linear(_norm(x, state, f"{b}ln_2", 1e-5), state, f"{b}mlp.c_fc")
            x = x + _linear(y * torch.sigmoid(1.702 * y), state, f"{b}mlp.c_proj")
    return _norm(x, state, "ln_vision", 1e-5)


def fused(state: State, s: Size, image: Tensor, ids: Tensor) -> Tensor:
    """Query tokens, and the words `ids` (L,) without padding, over the image tokens (P, width): (Q + L, hidden)."""
    return _through(state, s, state["query_tokens"][0], ids, image)


def second_pass(state: State, s: Size, queries: Tensor, ids: Tensor, bert: str) -> Tensor:
    """The first pass's query outputs in the queries' place, without an image, through `bert`: (Q + L, hidden)."""
    return _through(state, s, queries, ids, None, bert)


def _through(state: State, s: Size, first: Tensor, ids: Tensor, image: Tensor | None, b: str = "Qformer.bert.") -> Tensor:
    """SPRC's branch: without an image, no cross-attention, and all positions through the text's feed-forward layers."""
    text = state[f"{b}embeddings.word_embeddings.weight"][ids] + state[f"{b}embeddings.position_embeddings.weight"][: len(ids)]
    x = _norm(torch.cat([first, text]), state, f"{b}embeddings.LayerNorm", 1e-12)
    for n in range(s.layers):
        p = f"{b}encoder.layer.{n}."

        def attended(x: Tensor, over: Tensor, name: str) -> Tensor:
            q, k, v = (
                _linear(x, state, f"{name}.self.query"),
                _linear(over, state, f"{name}.self.key"),
                _linear(over, state, f"{name}.self.value"),
            )
            y = _linear(_attend(q, k, v, s.qformer_heads), state, f"{name}.output.dense")
            return _norm(y + x, state, f"{name}.output.LayerNorm", 1e-12)

        x = attended(x, x, f"{p}attention")
        parts = [(x, "")]
        if image is not None:
            queries, text = x[: s.queries], x[s.queries :]
            if n % 2 == 0:
                queries = attended(queries, image, f"{p}crossattention")
            parts = [(queries, "_query"), (text, "")] if len(text) else [(queries, "_query")]
        made = []
        for part, end in parts:
            y = _linear(_gelu(_linear(part, state, f"{p}intermediate{end}.dense")), state, f"{p}output{end}.dense")
            made.append(_norm(y + part, state, f"{p}output{end}.LayerNorm", 1e-12))
        x = torch.cat(made)
    return x


def _unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def target_tokens(state: State, s: Size, image: Tensor) -> Tensor:
    """(Q, joint), unit norm each."""
    return _unit(_linear(fused(state, s, image, torch.empty(0, dtype=torch.int64)), state, "vision_proj"))


def mean_query(state: State, s: Size, image: Tensor, ids: Tensor) -> Tensor:
    """QuRe's query (joint,)."""
    return _unit(_linear(fused(state, s, image, ids)[: s.queries], state, "text_proj").mean(0))


def query(layout: str, state: State, s: Size, image: Tensor, ids: Tensor) -> Tensor:
    """The authors' query (joint,); for "lavis", of which there is none, image and text embeddings added."""
    if layout == "qure":
        return mean_query(state, s, image, ids)
    if layout == "lavis":
        seen = _unit(target_tokens(state, s, image).mean(0))
        read = _through(state, s, torch.empty(0, s.hidden), ids, None)[0]
        return _unit(seen + _unit(_linear(read, state, "text_proj")))
    outputs = fused(state, s, image, ids)[: s.queries]
    second = {"sprc": ("Qformer.bert.", "text_proj"), "spn4cir": ("Qformer_query.bert.", "text_proj_q")}[layout]
    return _unit(_linear(second_pass(state, s, outputs, ids, second[0])[s.queries], state, second[1]))
