"""The smallest model and dataset that train: 16 x 16 px garments, one layer, seconds on one core."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dqe_engine.contracts.preprocessing import PreprocessingSpec
from dqe_engine.contracts.vocabulary import AttributeVocabulary
from dqe_engine.contracts.zones import ZoneSpec
from dqe_training.checkpointing.checkpoint import Progress, save_checkpoint
from dqe_training.config import (
    BaseQuery,
    LossConfig,
    ModelConfig,
    OptimConfig,
    QFormerConfig,
    TrainConfig,
    TRNSConfig,
    VisionConfig,
    WeightInputs,
)
from dqe_training.data.garments.catalog import vocabulary
from dqe_training.data.garments.dataset import GarmentsSpec, write_garments
from dqe_training.data.images import load_pixels
from dqe_training.data.triplets import TripletData
from dqe_training.model import DQEModel
from dqe_training.run.trainer import Trainer
from dqe_training.run.workflow import DataSource, build_model, make_tokenizer
from dqe_training.tokenizer import build_tokenizer

IMAGE_SIZE = 16
SPEC = GarmentsSpec(train_images=64, train_triplets=40, gallery_images=60, val_queries=24, image_size=IMAGE_SIZE)
# The same as YAML overrides of the shipped preset, for the command lines.
OVERRIDES = (
    "vision_weights=", f"model.preprocessing.image_size={IMAGE_SIZE}", "model.vision.hidden_size=16", "model.vision.layers=1",
    "model.vision.heads=2", "model.qformer.hidden_size=16", "model.qformer.layers=1", "model.qformer.heads=2",
    "model.qformer.query_tokens=3", "model.qformer.embedding_dim=8", "optim.batch_size=8", "optim.epochs=2",
    "optim.vision_learning_rate=1e-3",
)  # fmt: skip

Listener = Callable[[dict[str, Any]], None]


def model_config(
    *,
    attribute_weights: bool = True,
    base_query: BaseQuery = "mean",
    text_share: float = 0.5,
    weights_from: WeightInputs = "text",
    **qformer: Any,
) -> ModelConfig:
    sizes: dict[str, Any] = {"hidden_size": 16, "layers": 1, "heads": 2, "query_tokens": 3, "embedding_dim": 8}
    return ModelConfig(
        preprocessing=PreprocessingSpec(image_size=IMAGE_SIZE),
        vision=VisionConfig(hidden_size=16, layers=1, heads=2, patch_size=8),
        qformer=QFormerConfig(**sizes | qformer),
        attribute_weights=attribute_weights,
        base_query=base_query,
        text_share=text_share,
        weights_from=weights_from,
    )


def train_config(
    model: ModelConfig | None = None, *, loss: LossConfig | None = None, trns: TRNSConfig | None = None, **optim: Any
) -> TrainConfig:
    """Five steps an epoch over `SPEC`; negatives from the second epoch on; a checkpoint every third step."""
    plan: dict[str, Any] = {"epochs": 3, "batch_size": 8, "checkpoint_every": 3, "log_every": 1}
    zones = ZoneSpec(lo=0.05, hi=0.5, bounds="pooled", policy="uniform")
    return TrainConfig(
        model=model or model_config(),
        loss=loss or LossConfig(),
        trns=trns or TRNSConfig(warmup_epochs=1, interval=1, picks=4, zones=zones),
        optim=OptimConfig(**plan | optim),
    )


def heads_alone(model: ModelConfig | None = None, *, start: str = "runs/model", **optim: Any) -> TrainConfig:
    """`train_config` of the attribute heads alone. Where no model is built from it, `start` need not be there."""
    return msgspec.structs.replace(train_config(model, **optim), finetune="attributes", start=start)


def make_model(
    config: ModelConfig | None = None, *, vocab: AttributeVocabulary | None = None, vocab_size: int = 200, seed: int = 0
) -> DQEModel:
    """Random weights, larger than an initialisation's, so that everything matters by more than rounding; in eval mode."""
    torch.manual_seed(seed)
    model = DQEModel(config or model_config(), vocabulary() if vocab is None else vocab, vocab_size)
    with torch.no_grad():
        if model.vocabulary.attributes:
            model.attribute_heads.gain.normal_()
        for parameter in (*model.qformer.parameters(), *model.embeddings.parameters(), model.query_tokens):
            if parameter.ndim >= 2:
                parameter.normal_(std=1.5 * parameter.shape[-1] ** -0.5)
    return model.eval()


def query_inputs(model: DQEModel, batch: int, length: int, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Image tokens, ids and mask of texts of different lengths, at least 2 and one of `length`."""
    generator = torch.Generator().manual_seed(seed)
    sizes = model.sizes
    tokens = torch.randn(batch, sizes.image_tokens, sizes.vision_width, generator=generator)
    ids = torch.randint(4, model.embeddings.word_embeddings.num_embeddings, (batch, length), generator=generator)
    lengths = torch.randint(2, length + 1, (batch, 1), generator=generator)
    lengths[0] = length
    mask = (torch.arange(length)[None, :] < lengths).to(torch.int64)
    return tokens, ids * mask, mask


def write_checkpoint(path: Path, model: ModelConfig | None = None, *, vocab: AttributeVocabulary | None = None) -> Path:
    """A checkpoint of `make_model`, whose tokenizer knows the words of garments."""
    texts = [word for attribute in vocabulary().attributes for word in attribute.words]
    tokenizer = build_tokenizer(texts)
    config = train_config(model)
    save_checkpoint(
        path, make_model(config.model, vocab=vocab, vocab_size=tokenizer.get_vocab_size()), tokenizer, config=config, progress=Progress(),
        serving_zones=ZoneSpec(lo=0.03, hi=0.25, policy="hardest"),
    )  # fmt: skip
    return path


def write_tiny_garments(directory: Path) -> Path:
    return write_garments(directory, SPEC)


def load_tiny(directory: Path) -> tuple[TripletData, NDArray[np.uint8], DataSource]:
    source = DataSource.from_directory(directory)
    data = source.read(source.read_vocabulary())
    return data, load_pixels(source.images, data.images, PreprocessingSpec(image_size=IMAGE_SIZE)), source


def make_trainer(config: TrainConfig, data: TripletData, pixels: NDArray[np.uint8], run: Path, **options: Any) -> Trainer:
    """`options` as `Trainer` takes them."""
    tokenizer = make_tokenizer(config, data.texts)
    model = build_model(config, vocabulary(), tokenizer.get_vocab_size())
    return Trainer(model, tokenizer, config, data, pixels, run, **options)


@contextmanager
def one_cpu_thread() -> Iterator[None]:
    """Sums that repeat to the bit, whatever the machine has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield
    torch.set_num_threads(threads)


def flip_byte(path: Path, position: int = -1) -> None:
    """Change one byte; by default the middle one."""
    content = bytearray(path.read_bytes())
    content[position if position >= 0 else len(content) // 2] ^= 0x01
    path.write_bytes(bytes(content))
