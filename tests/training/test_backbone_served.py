"""From a BLIP-2 checkpoint to search results: fine-tuned with adapters and a feature cache, exported, served without torch."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.tiny_blip2 import write_blip2

from dqe_engine import Query, RetrievalEngine
from dqe_export.bundle import export_bundle
from dqe_training.checkpointing.checkpoint import load_checkpoint
from dqe_training.cli import train
from dqe_training.evaluation.protocol import load_evaluation_set
from dqe_training.evaluation.pytorch import encode_gallery_images, evaluate_model
from dqe_training.evaluation.runtime import agreement, evaluate_engine, index_gallery


@pytest.mark.slow
@pytest.mark.usefixtures("graphs_traced_once")
def test_a_fine_tuned_backbone_is_served(garments: Path, tmp_path: Path) -> None:
    write_blip2(tmp_path / "blip2")
    arguments = [f"backbone={tmp_path / 'blip2'}", "finetune=lora", "optim.epochs=1", "optim.batch_size=8", "optim.learning_rate=1e-3"]
    run = tmp_path / "run"
    assert train.main([*arguments, "--data", str(garments), "--out", str(run), "--features", str(tmp_path / "cache")]) == 0
    checkpoint = load_checkpoint(run / "model")
    manifest = export_bundle(checkpoint, tmp_path / "bundle")
    assert manifest.preprocessing == checkpoint.meta.config.model.preprocessing
    assert manifest.tokenizer.max_length == 40
    engine = RetrievalEngine.load(tmp_path / "bundle", provider="cpu")
    evaluation = load_evaluation_set(garments)
    images = garments / "images"
    index_gallery(engine, images, evaluation)
    tokens = encode_gallery_images(checkpoint.model, images, evaluation)
    ours = evaluate_model(checkpoint.model, checkpoint.tokenizer, evaluation, tokens)
    theirs = evaluate_engine(engine, evaluation)
    same, difference, recalls = agreement(ours, theirs)
    assert difference < 1e-4
    assert same > 0.9
    assert recalls
    hits = engine.search(Query(reference_id=evaluation.gallery[0], text="an <image> that is [DEC] longer", k=3)).hits
    assert len(hits) == 3
