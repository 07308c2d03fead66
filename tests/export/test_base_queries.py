"""Every base query in every form of a bundle: held by the export's own gate, and in its answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support.slow_qformer import slow_base_queries
from support.tiny_training import model_config, query_inputs, write_checkpoint

from dqe_engine import Query, RetrievalEngine
from dqe_engine.bundle import Bundle
from dqe_engine.contracts.graphs import GRAPHS, QUERY_ENCODER
from dqe_export.attention_blocks import attention_blocks
from dqe_export.cli.export import main
from dqe_training.checkpointing.checkpoint import load_checkpoint
from dqe_training.config import BaseQuery

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = {"hidden_size": 64, "layers": 2, "cross_attention_frequency": 2, "query_tokens": 4, "embedding_dim": 16, "max_text_length": 20}
FORMS = {
    "f32": (["--precision", "f32"], 1e-4),
    "f32 for a GPU": (["--precision", "f32", "--target", "cuda"], 1e-4),
    "f16": (["--precision", "f16"], 2e-2),
    "f16 for a GPU": (["--precision", "f16", "--target", "cuda"], 2e-2),
    "int8": (["--precision", "int8"], 0.15),
}
"""Options, and how far any element of a base query may be from the slow reference."""


@pytest.fixture(scope="module", params=["two_pass", "two_encoders", "zero_shot"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    kind: BaseQuery = request.param
    return write_checkpoint(tmp_path_factory.mktemp(kind) / "model", model_config(base_query=kind, text_share=0.4, **SIZES))


@pytest.mark.parametrize("form", ["f32", *(pytest.param(form, marks=pytest.mark.slow) for form in FORMS if form != "f32")])
def test_it_is_exported_and_answers(form: str, checkpoint: Path, garments: Path, tmp_path: Path) -> None:
    options, allowed = FORMS[form]
    assert main([str(checkpoint), str(tmp_path / "bundle"), "--data", str(garments), *options]) == 0
    bundle = Bundle.load(tmp_path / "bundle")
    assert bundle.manifest.graphs == GRAPHS
    assert bundle.manifest.retrieval is not None
    model = load_checkpoint(checkpoint).model
    session = bundle.session(QUERY_ENCODER, provider="cpu", threads=1)
    for batch, length in ((1, 1), (1, 20), (5, 9), (33, 20)):
        tokens, ids, mask = query_inputs(model, batch, max(length, 2))
        ids, mask = ids[:, :length], mask[:, :length]
        found = session.run(image_tokens=tokens.numpy(), input_ids=ids.numpy(), attention_mask=mask.numpy())["base_query"]
        assert np.abs(found - slow_base_queries(model, tokens, ids, mask)).max() < allowed
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=0, atol=1e-3)
    if "GPU" in form:
        import onnx

        graph = onnx.load(tmp_path / "bundle" / QUERY_ENCODER.file).graph
        folded = model.config.base_query == "zero_shot"  # the first layer over the queries alone is computed at export
        assert len(list(attention_blocks(graph))) == 2 * SIZES["layers"] + 1 - folded  # two passes, of which one sees the image, once


def test_a_text_alone_is_blip2s_text_embedding(checkpoint: Path, tmp_path: Path) -> None:
    model = load_checkpoint(checkpoint).model
    if model.config.base_query != "zero_shot":
        pytest.skip("zero_shot's alone")
    assert main([str(checkpoint), str(tmp_path / "bundle")]) == 0
    engine = RetrievalEngine.load(tmp_path / "bundle", provider="cpu", threads=1)
    weightless = dict.fromkeys(engine.bundle.vocabulary.names, 0.0)
    found = engine.encode_queries([Query(text="is red", absolute_weights=weightless)]).queries
    read = engine.bundle.text_encoder().tokenise(["is red"])[0].ids
    ids = torch.tensor([read])
    with torch.inference_mode():
        first = model.qformer(query_embeds=model.embeddings(ids), query_length=0, attention_mask=torch.ones_like(ids)).last_hidden_state
        expected = torch.nn.functional.normalize(model.text_projection(first[:, 0]), dim=-1)
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-5)
