"""The second pass as SPRC's own classes compute it: queries and targets of a toy-size file with random weights, through model and runtime.

The file is not part of the repository: `published` beside the realdata, whose README says how it was made.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support.tiny_training import one_cpu_thread

from dqe_engine.compose import compose_query
from dqe_engine.contracts.graphs import QUERY_ENCODER, TARGET_ENCODER
from dqe_engine.contracts.preprocessing import PreprocessingSpec
from dqe_engine.contracts.vocabulary import AttributeVocabulary
from dqe_engine.sessions import OnnxSession
from dqe_export.onnx_graph import export_graph
from dqe_export.parity import check_parity
from dqe_training.config import ModelConfig, QFormerConfig, VisionConfig
from dqe_training.model import DQEModel
from dqe_training.model.gpu_attention import gpu_attention

pytestmark = pytest.mark.realdata
CLASS = "Blip2QformerCirAlignPrompt"
CONFIG = ModelConfig(
    preprocessing=PreprocessingSpec(image_size=28),
    vision=VisionConfig(hidden_size=44, layers=3, heads=4, mlp_ratio=4.3637, patch_size=14),
    qformer=QFormerConfig(
        hidden_size=32, layers=4, heads=4, mlp_size=64, query_tokens=32, embedding_dim=256, cross_attention_frequency=2,
        position_embeddings=64,
    ),
    base_query="two_pass",
    attribute_weights=False,
)  # fmt: skip
Golden = dict[str, NDArray[np.float32]]


@pytest.fixture(scope="module")
def published(realdata: Path) -> Path:
    folder = realdata / "published"
    if not (folder / "sprc_vitg_tiny.npz").is_file():
        pytest.skip(f"no golden outputs of published models at {folder}; they are made with those models' own code")
    return folder


@pytest.fixture(scope="module")
def golden(published: Path) -> Golden:
    """Inputs, and what SPRC's classes give for them."""
    with np.load(published / "sprc_vitg_tiny.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def model(published: Path) -> DQEModel:
    """With SPRC's Q-Former; the vision tower stays random, since the golden outputs begin with image tokens."""
    state = torch.load(published / "sprc_vitg_tiny.pt", weights_only=True)[CLASS]
    model = DQEModel(CONFIG, AttributeVocabulary(attributes=()), 120).eval()
    named = {ours: value for name, value in state.items() if (ours := renamed(name)) is not None}
    loaded = model.load_state_dict(named, strict=False)
    assert not loaded.unexpected_keys
    assert all(name.startswith("vision_model.") for name in loaded.missing_keys)
    return model


def renamed(name: str) -> str | None:
    """A key of LAVIS's Q-Former as upstream's, which ours is; None for what a search does not need."""
    for theirs, ours in (("query_tokens", "query_tokens"), ("vision_proj.", "vision_projection."), ("text_proj.", "text_projection.")):
        if name.startswith(theirs):
            return name.replace(theirs, ours)
    part = name.removeprefix("Qformer.bert.")
    if part == name or part == "embeddings.position_ids":
        return None
    if part.startswith("embeddings."):
        return part.replace("embeddings.LayerNorm", "qformer.layernorm")
    return f"qformer.{part.replace('.self.', '.attention.')}"


def inputs(golden: Golden) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return tuple(torch.from_numpy(golden[name]) for name in ("image_tokens", "input_ids", "attention_mask"))  # type: ignore[return-value]


def test_query_and_targets_are_sprcs(model: DQEModel, golden: Golden) -> None:
    tokens, ids, mask = inputs(golden)
    assert 0 < mask.sum() < mask.numel()  # padded
    with torch.inference_mode():
        query, targets = model.encode_query(tokens[:5], ids, mask).query, model.encode_targets(tokens)
        with gpu_attention(model):
            fused = model.encode_query(tokens[:5], ids, mask).query
        alone = [model.encode_query(tokens[b : b + 1], *(t[b : b + 1, : mask[b].sum()] for t in (ids, mask))).query for b in range(5)]
    for found in (query, fused, torch.cat(alone)):
        np.testing.assert_allclose(found.numpy(), golden["query"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(targets.numpy(), golden["target_tokens"], rtol=0, atol=1e-5)
    scores = np.einsum("bd,imd->bim", query.numpy(), targets.numpy()).max(axis=2)
    np.testing.assert_allclose(scores, golden["scores"], rtol=0, atol=1e-5)


def test_the_graphs_are_sprcs(model: DQEModel, golden: Golden, tmp_path: Path) -> None:
    found = {}
    with one_cpu_thread():
        for spec in (QUERY_ENCODER, TARGET_ENCODER):
            export_graph(spec, model, tmp_path / spec.file)
            check_parity(spec, model, tmp_path / spec.file)
            session = OnnxSession(tmp_path / spec.file, spec, model.sizes, provider="cpu")
            given = golden | {"image_tokens": golden["image_tokens"][: 5 if spec is QUERY_ENCODER else 7]}
            found |= session.run(**{tensor.name: given[tensor.name] for tensor in spec.inputs})
    none = np.zeros((5, 0, 256), np.float32)
    np.testing.assert_allclose(compose_query(found["base_query"], none, none[:, :, 0]), golden["query"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(found["target_tokens"], golden["target_tokens"], rtol=0, atol=1e-4)
