"""Imported models in the runtime, from files of images and texts to scores, on what a careless reading shows; the other pairings of
layout and tower than those of the golden outputs."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import published_models as files
from support.tiny_training import one_cpu_thread

from dqe_engine.engine import RetrievalEngine
from dqe_engine.errors import InputError
from dqe_engine.query import Query
from dqe_export.bundle import export_bundle
from dqe_export.upstream_reading import pixel_values, token_ids
from dqe_training.checkpointing.checkpoint import load_checkpoint
from dqe_training.importing import ImportOptions, import_model
from dqe_training.model import score

SIZES = ((1, 1), (1, 50), (300, 2), (5, 4), (4, 5), (126, 100), (124, 100), (12, 12), (13, 12), (12, 15), (15, 11), (61, 20))
TEXTS = (
    ".", '.!"()*#:;~', " ! \t\n ;", "a photo of $ that is RED!", "red " * 29, "red " * 30, "red " * 31, "red " * 51, "x" * 101,
    "red [SEP] blue [DEC]", "v.neck(red)long*sleeves", "👗🏽 in İSTANBUL", "赤いドレス", "red\x00blue\u200bred", "\ud83d red",
    "e\u0301\u0302",
)  # fmt: skip


def picture(width: int, height: int) -> bytes:
    pixels = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3)).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize(("layout", "tower"), [("sprc", "clip"), ("qure", "eva")])
@torch.inference_mode()
def test_odd_images_and_texts_are_scored_as_pytorch_scores_them(layout: str, tower: str, tmp_path: Path) -> None:
    size = replace(files.TINY[tower], layers=2, depth=1)
    files.save(layout, tmp_path / "file.pt", size, half_tower=True)
    words = files.write_vocabulary(tmp_path / "vocab.txt", size.words)
    options = ImportOptions(tokenizer=str(words), vision_heads=size.heads, qformer_heads=size.qformer_heads)
    import_model(tmp_path / "file.pt", tmp_path / "model", options)
    checkpoint = load_checkpoint(tmp_path / "model")
    with one_cpu_thread():
        export_bundle(checkpoint, tmp_path / "bundle")
        engine = RetrievalEngine.load(tmp_path / "bundle", provider="cpu", threads=1)
    model, config = checkpoint.model, checkpoint.meta.config.model
    images = {f"{width} x {height}": picture(width, height) for width, height in SIZES}
    pixels = np.stack([pixel_values(data, config.preprocessing) for data in images.values()])
    tokens = model.encode_images(torch.from_numpy(pixels))
    joined = [text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace") for text in TEXTS]
    asked = token_ids(joined, tmp_path / "model" / "tokenizer.json", pad_id=0, max_length=32, captions="blip")
    assert asked["attention_mask"].sum(1).tolist()[:9] == [2, 2, 2, 9, 31, 32, 32, 32, 3]
    reference = [row % len(images) for row in range(len(TEXTS))]
    ids, mask = (torch.from_numpy(asked[name]) for name in ("input_ids", "attention_mask"))
    expected = score(model.encode_query(tokens[reference], ids, mask).query, model.encode_targets(tokens)).numpy()

    engine.new_index()
    engine.index_images(images)
    names = list(images)
    questions = [Query(image=images[names[at]], text=text, k=len(names)) for at, text in zip(reference, TEXTS, strict=True)]
    for found in (engine.search_batch(questions), [engine.search(question) for question in questions]):
        scores = [[{hit.id: hit.score for hit in result.hits}[name] for name in names] for result in found]
        np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5)
    assert [result.truncated for result in found] == [text.count("red ") > 30 for text in TEXTS]
    for nothing in ("", "  \n"):
        with pytest.raises(InputError, match="has no words"):
            engine.search(Query(image=images[names[0]], text=nothing))
