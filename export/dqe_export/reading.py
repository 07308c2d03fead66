"""What the runtime makes of images, texts and attribute names before and after its graphs, held against what the model was trained for.

Graphs may all be right and fed with other pixels than the model's. So the runtime itself reads made-up files and texts here, from
bytes, through the bundle's manifest and tokenizer, and what reaches its graphs is compared with what upstream's processor and
tokenizer make of the checkpoint's configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dqe_engine.bundle import Bundle
from dqe_engine.contracts.graphs import ATTRIBUTE_HEADS, QUERY_ENCODER, VISION_ENCODER, GraphSizes, GraphSpec, graphs_of
from dqe_engine.engine import RetrievalEngine
from dqe_engine.errors import ParityError
from dqe_engine.query import Query
from dqe_training.checkpointing.checkpoint import Checkpoint
from dqe_training.model.attributes import compose

from .reading_samples import TEXTS, sample_images
from .upstream_reading import pixel_values, token_ids

_CLOSE = 1e-5
"""Of pixel values and composed queries, which are equal but for the last bit: one level of 256 is some 0.015."""


class Recorder:
    """Stands where a graph would run: keeps what it is given, and gives random outputs of the right shapes."""

    provider = "recorder"

    def __init__(self, spec: GraphSpec, sizes: GraphSizes) -> None:
        self.spec, self._sizes = spec, sizes
        self.given: dict[str, NDArray[Any]] = {}
        self.gave: dict[str, NDArray[Any]] = {}

    def run(self, **inputs: NDArray[Any]) -> dict[str, NDArray[Any]]:
        first = self.spec.inputs[0]
        batch = len(inputs[first.name])
        length = inputs["attention_mask"].shape[1] if "attention_mask" in inputs else 0
        rng = np.random.default_rng(0)
        self.given = dict(inputs)
        self.gave = {
            tensor.name: rng.uniform(0.1, 1, tensor.shape(self._sizes, batch=batch, text_length=length)).astype(np.float32)
            for tensor in self.spec.outputs
        }
        return dict(self.gave)


def check_reading(checkpoint: Checkpoint, directory: Path) -> None:
    """Hold the bundle `directory` to the checkpoint's preprocessing, tokenizer and attributes. Its graphs are not run.

    Raises ParityError, which names the image, the text or the attribute.
    """
    bundle = Bundle.load(directory, verify=False)
    recorders = {spec.name: Recorder(spec, bundle.sizes) for spec in graphs_of(bundle.sizes)}
    engine = RetrievalEngine(bundle, lambda spec: recorders[spec.name], kept_bytes=0)  # each call is to reach the graphs
    _check_images(checkpoint, engine, recorders[VISION_ENCODER.name])
    _check_texts(checkpoint, engine, recorders[QUERY_ENCODER.name])
    _check_attributes(checkpoint, engine, recorders)


def _check_images(checkpoint: Checkpoint, engine: RetrievalEngine, vision: Recorder) -> None:
    spec = checkpoint.meta.config.model.preprocessing
    images = sample_images(spec.image_size)
    expected = np.stack([pixel_values(data, spec) for data in images.values()])
    ways: list[tuple[str, NDArray[Any]]] = []
    engine.encode_queries([Query(image=image, text="red") for image in images.values()])
    ways.append(("as a reference", vision.given["pixel_values"]))
    engine.new_index()
    engine.index_images(images, batch_size=len(images))
    ways.append(("in the gallery", vision.given["pixel_values"]))
    for way, found in ways:
        for name, ours, theirs in zip(images, found, expected, strict=True):
            off = float(np.abs(ours - theirs).max(initial=0)) if ours.shape == theirs.shape else np.inf
            if not off <= _CLOSE:
                raise ParityError(
                    f"preprocessing: an image ({name}), {way}, reaches the vision encoder with other pixels than upstream's processor "
                    f"gives it by the checkpoint's configuration (off by {off:.2g}); nothing was written"
                )


def _check_texts(checkpoint: Checkpoint, engine: RetrievalEngine, query: Recorder) -> None:
    model = checkpoint.model
    expected = token_ids(
        list(TEXTS.values()),
        checkpoint.directory / checkpoint.meta.tokenizer.file,
        pad_id=model.embeddings.word_embeddings.padding_idx or 0,
        max_length=model.config.qformer.max_text_length,
        captions=model.config.captions,
    )
    image = next(iter(sample_images(model.sizes.image_size).values()))
    engine.encode_queries([Query(image=image, text=text) for text in TEXTS.values()])
    for tensor, theirs in expected.items():
        ours = query.given[tensor]
        for row, (name, text) in enumerate(TEXTS.items()):
            if ours.shape != theirs.shape or not np.array_equal(ours[row], theirs[row]):
                raise ParityError(
                    f"tokenizer: a text ({name}: {text[:40]!r}) reaches the query encoder with other {tensor} than upstream's tokenizer "
                    "gives it by the checkpoint's configuration; nothing was written"
                )


def _check_attributes(checkpoint: Checkpoint, engine: RetrievalEngine, recorders: Mapping[str, Recorder]) -> None:
    """The names in the order of the model's heads, and each name moves its own head."""
    wanted, found = checkpoint.model.vocabulary, engine.bundle.vocabulary
    if found.names != wanted.names:
        raise ParityError(
            f"attributes: the bundle calls its heads {', '.join(found.names)}, the model's are {', '.join(wanted.names)}; "
            "nothing was written"
        )
    if found != wanted:
        raise ParityError("attributes: the bundle's values or words of its attributes are not the checkpoint's; nothing was written")
    image = next(iter(sample_images(engine.bundle.sizes.image_size).values()))
    for position, name in enumerate(wanted.names):
        encoded = engine.encode_queries([Query(image=image, text="red", weights={name: 3.0})])
        read = recorders[ATTRIBUTE_HEADS.name].gave
        weights = torch.from_numpy(read["attribute_weights"].copy())
        weights[:, position] *= 3
        base = torch.from_numpy(recorders[QUERY_ENCODER.name].gave["base_query"])
        expected = compose(base, torch.from_numpy(read["sub_queries"]), weights).numpy()
        if not np.abs(encoded.queries - expected).max() <= _CLOSE:
            raise ParityError(f"attributes: the weight of {name!r} moves another head than the model's of that name; nothing was written")
