"""A BLIP-2 image-text checkpoint of upstream's own making, random and tiny, in the format of the published ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from transformers import Blip2Config, Blip2ForImageTextRetrieval

from dqe_engine.contracts.preprocessing import CLIP_MEAN, CLIP_STD
from dqe_engine.contracts.vocabulary import PAPER_VOCABULARY
from dqe_training.config import TrainConfig
from dqe_training.data.garments.catalog import vocabulary
from dqe_training.model import DQEModel
from dqe_training.run.configuration import load_config
from dqe_training.run.workflow import build_model
from dqe_training.tokenizer import build_tokenizer

IMAGE_SIZE = 16
VISION = {
    "hidden_size": 24, "intermediate_size": 100, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": IMAGE_SIZE,
    "patch_size": 8, "layer_norm_eps": 1e-3, "initializer_range": 0.2,
}  # fmt: skip
QFORMER = {
    "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 36, "max_position_embeddings": 40,
    "use_qformer_text_input": True, "cross_attention_frequency": 2, "layer_norm_eps": 1e-4,
}  # fmt: skip


def write_blip2(
    directory: Path, *, shard_size: str = "12KB", vision: dict[str, Any] | None = None, seed: int = 0
) -> Blip2ForImageTextRetrieval:
    """Write `directory` (several safetensors shards by default) and return upstream's model, in eval mode.

    Its tokenizer has [DEC], the last row of the embedding table, and `<image>`, which lies past it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    words = [word for attribute in vocabulary().attributes for word in attribute.words]
    tokenizer = build_tokenizer([*words, "is red and has stripes, make it a longer dress"])
    tokenizer.add_special_tokens(["[DEC]"])
    rows = tokenizer.get_vocab_size()
    tokenizer.add_tokens([AddedToken("<image>", normalized=False, special=True)])
    tokenizer.enable_truncation(512)
    tokenizer.enable_padding(pad_id=0, pad_token="[PAD]")
    tokenizer.save(str(directory / "tokenizer.json"))
    torch.manual_seed(seed)
    config = Blip2Config(
        vision_config=VISION | (vision or {}), qformer_config=QFORMER | {"vocab_size": rows}, num_query_tokens=3, image_text_hidden_size=8
    )
    model = Blip2ForImageTextRetrieval(config).eval()
    with torch.no_grad():  # upstream starts query tokens at zero and the rest too small to matter
        for parameter in model.parameters():
            parameter.normal_(std=1.5 * parameter.shape[-1] ** -0.5 if parameter.ndim >= 2 else 0.3)
    model.save_pretrained(directory, max_shard_size=shard_size)
    (directory / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "image_processor_type": "BlipImageProcessor", "do_resize": True, "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
                "resample": 3, "do_rescale": True, "rescale_factor": 0.00392156862745098, "do_normalize": True,
                "image_mean": CLIP_MEAN, "image_std": CLIP_STD, "do_convert_rgb": True,
            }
        )
    )  # fmt: skip
    return model


def config_of(directory: Path, *overrides: str) -> TrainConfig:
    return load_config("blip2", [f"backbone={directory}", *overrides])


def model_of(directory: Path, *overrides: str) -> DQEModel:
    return build_model(config_of(directory, *overrides), PAPER_VOCABULARY, 0).eval()
