"""What dqe-train, the demo and the tests share: from files on disk to a trained run."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Protocol

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from tokenizers import Tokenizer

from dqe_engine.contracts.parsing import NOT_JSON, parse
from dqe_engine.contracts.preprocessing import PreprocessingSpec
from dqe_engine.contracts.vocabulary import PAPER_VOCABULARY, AttributeVocabulary
from dqe_engine.errors import CheckpointError, InputError

from ..backbone import find_backbone
from ..backbone.tokenizer import load_backbone_tokenizer
from ..backbone.weights import load_backbone_weights, reading_weights
from ..checkpointing.checkpoint import load_checkpoint, load_start, stored_vision_dtype
from ..checkpointing.meta import verify_file
from ..checkpointing.start import read_start, start_directory
from ..config import ModelConfig, TrainConfig
from ..data.images import load_pixels
from ..data.label_coverage import label_coverage
from ..data.triplets import TripletData, load_triplets, read_vocabulary
from ..distributed import World
from ..encoding import Listener, TokenTable
from ..features import FeatureStore, fill
from ..features.identity import digest_images
from ..features.store import row_bytes, spell_bytes
from ..model import DQEModel, require_attributes
from ..tokenizer import build_tokenizer
from .configuration import load_config
from .idle import idle_parts, margin_acts
from .trainer import Trainer, silent
from .validation import Validation

SHIPPED_VISION = ("garments",)


class TrainingSource(Protocol):
    """Triplets to train on, and the folder that their image names are relative to."""

    @property
    def images(self) -> Path: ...
    @property
    def vocabulary(self) -> Path | None: ...
    def read_vocabulary(self) -> AttributeVocabulary: ...
    def read(self, vocabulary: AttributeVocabulary) -> TripletData: ...


@dataclass(frozen=True)
class DataSource:
    """Where training data lies. `directory` (a dataset folder) or `triplets` + `images` of one's own.

    `image_labels`: JSON lines `{"image", "attributes"}`; `vocabulary`: JSON; both optional. `prefix` keeps a split. `derive`:
    values that nothing states are derived from the texts (docs/attributes.md).
    """

    triplets: Path
    images: Path
    image_labels: Path | None = None
    vocabulary: Path | None = None
    prefix: str = ""
    derive: bool = True

    @classmethod
    def from_directory(cls, directory: Path, *, vocabulary: Path | None = None, derive: bool = True) -> DataSource:
        """A dataset folder as `dqe-data garments` writes it; `vocabulary` in place of its own, where one is given."""
        if not (directory / "train.jsonl").is_file():
            raise InputError(
                f"{directory}: no train.jsonl here, and no public dataset (docs/datasets.md has their folders); "
                "make one with dqe-data garments, or give --triplets and --images"
            )
        vocabulary = vocabulary or directory / "vocabulary.json"
        return cls(directory / "train.jsonl", directory / "images", directory / "images.jsonl", vocabulary, "train/", derive)

    def read_vocabulary(self) -> AttributeVocabulary:
        """The dataset's vocabulary, or the paper's colour and shape."""
        return PAPER_VOCABULARY if self.vocabulary is None else read_vocabulary(self.vocabulary)

    def read(self, vocabulary: AttributeVocabulary) -> TripletData:
        """The triplets in arrays. Raises InputError."""
        return load_triplets(self.triplets, vocabulary, image_labels=self.image_labels, prefix=self.prefix, derive=self.derive)


def vision_dtype(config: TrainConfig) -> torch.dtype:
    """The precision of the vision tower: float32 where it trains, else `vision_precision`; "auto" is float16 on CUDA, or what
    the checkpoint has where none of its bits may change."""
    wanted = config.optim.vision_precision
    if wanted == "auto":
        wanted = "float16" if config.optim.vision_learning_rate == 0 and torch.cuda.is_available() else "float32"
        if wanted == "float16" and config.start and config.encoder_frozen:
            return stored_vision_dtype(start_directory(config.start))
    return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[wanted]


def build_model(
    config: TrainConfig, vocabulary: AttributeVocabulary, vocab_size: int, *, listener: Listener = lambda event: None
) -> DQEModel:
    """A model initialised by `optim.seed`: from the checkpoint `start`, all but the attribute heads from `backbone`, or its vision
    tower from `vision_weights`, where one is set. Raises CheckpointError."""
    torch.manual_seed(config.optim.seed)
    model = DQEModel(config.model, vocabulary, vocab_size, empty_vision=bool(config.backbone or config.start))
    model.vision_model.to(vision_dtype(config))  # before a backbone is loaded: it is never in memory in float32 then
    if config.start:
        listener({"event": "start", "text": f"starting with {config.start}: {load_start(model, config)}"})
    elif config.backbone:
        load_backbone_weights(model, find_backbone(config.backbone))
    elif config.vision_weights:
        load_vision(model, config.vision_weights)
    return model


def load_tower(checkpoint: Path | None, *, backbone: str | None = None, overrides: Sequence[str] = ()) -> DQEModel:
    """A model for its vision tower alone, where there is a GPU on it: a checkpoint's, or that of a BLIP-2 `backbone`, in the
    precision that training would hold it in."""
    if checkpoint is not None:
        model = load_checkpoint(checkpoint, as_stored=torch.cuda.is_available()).model
    else:
        config = load_config("blip2", [f"backbone={backbone}", *overrides])
        model = build_model(config, PAPER_VOCABULARY, config.model.qformer.vocab_size)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def make_tokenizer(config: TrainConfig, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer of `start` or of the backbone, or one built from the training texts. Raises CheckpointError."""
    if config.start:
        meta = read_start(config.start)
        return Tokenizer.from_file(str(verify_file(start_directory(config.start), meta.file(meta.tokenizer.file))))
    if config.backbone:
        return load_backbone_tokenizer(find_backbone(config.backbone), config.model.qformer.vocab_size)
    return build_tokenizer(texts)


def load_vision(model: DQEModel, source: str) -> None:
    """Load a `dqe-pretrain` tower: a directory, or the name of one that ships. Raises CheckpointError."""
    if source in SHIPPED_VISION:
        with as_file(files("dqe_training.weights").joinpath(source)) as directory:
            _load_vision_directory(model, directory)
    else:
        _load_vision_directory(model, Path(source))


def _load_vision_directory(model: DQEModel, directory: Path) -> None:
    weights, record = directory / "vision.safetensors", directory / "vision.json"
    if not (weights.is_file() and record.is_file()):
        raise CheckpointError(f"{directory}: no vision tower here; give a dqe-pretrain directory or one of {', '.join(SHIPPED_VISION)}")
    try:
        made = parse(ModelConfig, msgspec.json.decode(record.read_bytes(), type=dict)["model"], where=str(record), error=CheckpointError)
    except (*NOT_JSON, KeyError) as error:
        raise CheckpointError(f"{record}: damaged, it does not say what the tower is; copy it again or run dqe-pretrain") from error
    if made.vision != model.config.vision or made.preprocessing != model.config.preprocessing:
        raise CheckpointError(
            f"{directory}: the tower is {made.vision} at {made.preprocessing.image_size} px, "
            f"the configuration wants {model.config.vision} at {model.config.preprocessing.image_size} px; make them equal"
        )
    with reading_weights(weights):
        tensors = load_file(weights)
    try:
        model.vision_model.load_state_dict({name: p.float() for name, p in tensors.items()})
    except RuntimeError as error:
        raise CheckpointError(
            f"{weights}: damaged, or of another architecture ({' '.join(str(error).split())[:200]}); copy it again, or run dqe-pretrain"
        ) from error


def _physical_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _check_memory(model: DQEModel, images: int, judged: int, *, frozen: bool, copies: int) -> None:
    """Raise InputError where pixels, and a frozen tower's tokens, also those of `judged` images of a validation, in float32, would not
    fit: being killed for it says less."""
    to_train = copies * images * (3 * model.sizes.image_size**2 + (row_bytes(model) if frozen else 0))
    need = to_train + (judged * 2 * row_bytes(model) if frozen else 0)
    memory = _physical_memory()
    if need > 0.8 * memory:
        remedy = "keep the tokens on disk with a feature cache (--features)" if frozen else "train on fewer or smaller images"
        if to_train <= 0.8 * memory:
            remedy += f", or leave out the validation, {judged:,} of them, with --eval-every never"
        ranks = f" in {copies} ranks" if copies > 1 else ""
        raise InputError(
            f"{images + judged:,} images take {spell_bytes(need)} of memory{ranks}, this machine has {spell_bytes(memory)}; {remedy}"
        )


def train_run(
    config: TrainConfig,
    source: TrainingSource,
    run: Path,
    *,
    listener: Listener = lambda event: None,
    pixels: NDArray[np.uint8] | None = None,
    image_tokens: TokenTable | None = None,
    features: Path | None = None,
    validation: Validation | None = None,
    strict: bool = False,
    world: World | None = None,
) -> Trainer:
    """Train to the end in `run` (resuming what is there) and return the trainer, whose `model` is in eval mode.

    `pixels` and `image_tokens` of the source's images may be given where several runs share them. `features`: the folder of
    a feature cache, which is filled with what it lacks; images are then neither decoded nor held in memory. Without, they
    are, and InputError is raised at once where this machine has too little of it. `validation`: queries to judge the model by as it
    trains; the best one is then in `run`/best. `strict`: a part of the training that would do nothing is an InputError, not a notice.
    `world`: the ranks that train together; each calls this with the same arguments, and the main one listens and writes.
    """
    world = world or World()
    if not world.main:
        listener = silent
    if features is not None and config.optim.vision_learning_rate > 0:
        raise InputError(f"{features}: a feature cache needs a frozen tower; set optim.vision_learning_rate to 0, or leave out --features")
    vocabulary = source.read_vocabulary()
    require_attributes(config.model, vocabulary)
    data = source.read(vocabulary)
    coverage = label_coverage(data, vocabulary, batch=config.optim.batch_size)
    idle = idle_parts(config, coverage)
    if strict and idle:
        raise InputError(f"with --strict, all that is turned on must act: {'; '.join(idle)}")
    for sentence in idle:
        listener({"event": "notice", "text": f"note: {sentence}"})
    if margin_acts(config, coverage):
        listener({"event": "notice", "text": coverage.message()})
    digests = digest_images(source.images, data.images)
    tokenizer = make_tokenizer(config, data.texts)
    model = build_model(config, vocabulary, tokenizer.get_vocab_size(), listener=listener)
    if features is not None:
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        image_tokens = fill(FeatureStore(features, model), model, source.images, data.images, digests, listener=listener)
        model.to("cpu")  # adapters are drawn where the model is: on the CPU, as without a cache
    elif pixels is None and image_tokens is None:
        judged = 0 if validation is None else validation.split.images
        _check_memory(model, len(data.images), judged, frozen=config.optim.vision_learning_rate == 0, copies=world.local_size)
        pixels = _load(source, data.images, config.model.preprocessing, listener)
    trainer = Trainer(
        model, tokenizer, config, data, pixels, run,
        listener=listener, image_tokens=image_tokens, image_digests=digests, validation=validation, features=features, world=world,
    )  # fmt: skip
    trainer.train()
    by_epochs = not config.optim.seconds and not config.optim.steps  # else this shows at the end
    if config.trns.enabled and not by_epochs and trainer.negatives.mined is None:
        warmup = config.trns.warmup_epochs
        listener({"event": "notice", "text": f"note: TRNS never mined, since training ended within trns.warmup_epochs, {warmup}"})
    return trainer


def _load(source: TrainingSource, images: Sequence[str], spec: PreprocessingSpec, listener: Listener) -> NDArray[np.uint8]:
    """`load_pixels`, with the listener told how far it is."""
    loaded = 0

    def advance(count: int) -> None:
        nonlocal loaded
        loaded += count
        listener({"event": "load", "done": loaded, "total": len(images)})

    return load_pixels(source.images, images, spec, advance=advance)
