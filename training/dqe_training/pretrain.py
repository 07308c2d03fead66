"""Pretraining of a small vision tower on attribute labels: the stand-in for BLIP-2's ViT where none can be downloaded."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from dqe_engine.contracts.parsing import Contract, to_json
from dqe_engine.contracts.vocabulary import AttributeVocabulary
from dqe_engine.errors import CheckpointError
from dqe_engine.files import atomic_directory, describe_write_error

from .config import ModelConfig
from .data.images import load_pixels, to_pixel_values
from .data.records import ImageRecord, read_jsonl
from .data.triplets import label_images, read_vocabulary
from .model.vision import build_vision


class PretrainConfig(Contract, frozen=True):
    epochs: int = 8
    batch_size: int = 128
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.05
    warmup_share: float = 0.05
    seed: int = 0


class AttributeClassifier(nn.Module):
    """The tower and one linear head per attribute on the mean of its patch tokens."""

    def __init__(self, model: ModelConfig, values: list[int]) -> None:
        super().__init__()
        self.vision = build_vision(model)
        self.heads = nn.ModuleList(nn.Linear(model.vision.hidden_size, n) for n in values)

    def forward(self, pixel_values: Tensor) -> list[Tensor]:
        """(B, 3, H, W) to one (B, values) tensor of logits per attribute."""
        tokens = self.vision(pixel_values).last_hidden_state  # (B, P, Hv)
        pooled = tokens[:, 1:].mean(dim=1)
        return [head(pooled) for head in self.heads]


def augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Shift by up to two pixels and flip half of the images left to right. (B, 3, H, W) to the same shape."""
    dx, dy = (int(v) for v in torch.randint(-2, 3, (2,), generator=generator))
    pixels = torch.roll(pixels, (dy, dx), dims=(2, 3))
    flip = torch.rand(len(pixels), generator=generator) < 0.5
    return torch.where(flip[:, None, None, None], pixels.flip(3), pixels)


def pretrain(
    pixels: NDArray[np.uint8],
    labels: NDArray[np.int64],
    model: ModelConfig,
    vocabulary: AttributeVocabulary,
    config: PretrainConfig,
    *,
    listener: Callable[[dict[str, Any]], None] = lambda event: None,
    validation: tuple[NDArray[np.uint8], NDArray[np.int64]] | None = None,
) -> tuple[AttributeClassifier, dict[str, float]]:
    """Train on `pixels` (N, H, W, 3) uint8 (resized already) and `labels` (N, A), -1 where unknown.

    Returns the classifier and, where `validation` is given, its accuracy per attribute.
    """
    torch.manual_seed(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    classifier = AttributeClassifier(model, [len(a.values) for a in vocabulary.attributes])
    decayed = [p for p in classifier.parameters() if p.ndim >= 2]
    plain = [p for p in classifier.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}], betas=(0.9, 0.98)
    )
    batch_size = min(config.batch_size, len(pixels))
    steps = config.epochs * (len(pixels) // batch_size)
    targets = torch.from_numpy(labels)
    step, started = 0, time.perf_counter()
    for epoch in range(config.epochs):
        order = torch.randperm(len(pixels), generator=generator)
        for rows in order[: len(order) // batch_size * batch_size].split(batch_size):
            progress = step / steps
            warm = min(1.0, progress / config.warmup_share) if config.warmup_share else 1.0
            rate = config.learning_rate * warm * (0.01 + 0.99 * 0.5 * (1 + np.cos(np.pi * progress)))
            for group in optimizer.param_groups:
                group["lr"] = rate
            logits = classifier(augment(to_pixel_values(pixels[rows.numpy()], model.preprocessing), generator))
            losses = [F.cross_entropy(z, targets[rows, a], ignore_index=-1, label_smoothing=0.02) for a, z in enumerate(logits)]
            loss = torch.stack(losses).sum()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(classifier.parameters(), 1.0)
            optimizer.step()
            step += 1
            if step % 10 == 0 or step == steps:
                rate = step * batch_size / (time.perf_counter() - started)
                event = {"event": "step", "step": step, "epoch": epoch, "fraction": step / steps, "loss/total": loss.item()}
                listener(event | {"triplets_per_second": rate})
    return classifier, accuracy(classifier, *validation, model, vocabulary) if validation else {}


@torch.inference_mode()
def accuracy(
    classifier: AttributeClassifier,
    pixels: NDArray[np.uint8],
    labels: NDArray[np.int64],
    model: ModelConfig,
    vocabulary: AttributeVocabulary,
) -> dict[str, float]:
    """Share of right labels per attribute."""
    hits: list[Tensor] = []
    for start in range(0, len(pixels), 256):
        logits = classifier(to_pixel_values(pixels[start : start + 256], model.preprocessing))
        predicted = torch.stack([z.argmax(1) for z in logits], dim=1)
        hits.append(predicted == torch.from_numpy(labels[start : start + 256]))
    share = torch.cat(hits).double().mean(0)
    return dict(zip(vocabulary.names, share.tolist(), strict=True))


def pretrain_from_dataset(
    directory: Path,
    out: Path,
    model: ModelConfig,
    config: PretrainConfig,
    *,
    listener: Callable[[dict[str, Any]], None] = lambda event: None,
    replace: bool = False,
) -> dict[str, float]:
    """Pretrain on a dataset folder's labels and write `vision.safetensors` (float16) and `vision.json` to `out`.

    Images whose name starts with `gallery/` are held back; the returned accuracy per attribute is theirs.
    """
    vocabulary = read_vocabulary(directory / "vocabulary.json")
    records = read_jsonl(directory / "images.jsonl", ImageRecord)
    labels = label_images(records, vocabulary)
    loaded = 0

    def advance(count: int) -> None:
        nonlocal loaded
        loaded += count
        listener({"event": "load", "done": loaded, "total": len(records)})

    pixels = load_pixels(directory / "images", [r.image for r in records], model.preprocessing, advance=advance)
    held_back = np.asarray([r.image.startswith("gallery/") for r in records])
    validation = (pixels[held_back], labels[held_back]) if held_back.any() else None
    classifier, figures = pretrain(
        pixels[~held_back], labels[~held_back], model, vocabulary, config, listener=listener, validation=validation
    )
    try:
        with atomic_directory(out, replace=replace, marker="vision.json") as temporary:
            state = {name: p.detach().half().contiguous() for name, p in classifier.vision.state_dict().items()}
            save_file(state, temporary / "vision.safetensors")
            record = {"model": model, "pretraining": config, "images": int((~held_back).sum()), "accuracy": figures}
            (temporary / "vision.json").write_bytes(to_json(record))
    except OSError as error:
        raise CheckpointError(describe_write_error(error, out)) from error
    return figures
