"""Attribute heads exported alone: held against PyTorch, into a bundle of the same encoder, and nowhere else."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from support.replayed_export import change_weight, replay
from support.tiny_training import query_inputs, write_tiny_garments

from dqe_engine.bundle import Bundle
from dqe_engine.cli.heads import main as replace
from dqe_engine.contracts.graphs import ATTRIBUTE_HEADS, GRAPHS, QUERY_ENCODER
from dqe_engine.contracts.vocabulary import Attribute, AttributeVocabulary
from dqe_engine.errors import InputError, ParityError
from dqe_engine.heads import load_heads
from dqe_export.cli.export import main
from dqe_export.heads import export_heads, export_heads_into
from dqe_training.checkpointing.checkpoint import load_checkpoint, save_checkpoint
from dqe_training.model import DQEModel

pytestmark = pytest.mark.usefixtures("one_thread")

OWN = AttributeVocabulary(attributes=tuple(Attribute(name=name, words=(name,)) for name in ("colour", "neckline", "fabric")))


@pytest.fixture
def bundle(bundle_path: Path, tmp_path: Path) -> Path:
    shutil.copytree(bundle_path, tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.fixture(scope="module")
def own_checkpoint(checkpoint_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same encoder under heads of another vocabulary."""
    return with_heads(checkpoint_path, OWN, tmp_path_factory.mktemp("own") / "model")


def with_heads(source: Path, vocabulary: AttributeVocabulary, out: Path, *, encoder_too: bool = False) -> Path:
    checkpoint = load_checkpoint(source)
    torch.manual_seed(5)
    model = DQEModel(checkpoint.model.config, vocabulary, checkpoint.tokenizer.get_vocab_size())
    encoder = {name: value for name, value in checkpoint.model.state_dict().items() if not name.startswith("attribute_heads.")}
    if encoder_too:
        encoder["query_tokens"] = encoder["query_tokens"] + 1e-6
    model.load_state_dict(encoder, strict=False)
    save_checkpoint(out, model, checkpoint.tokenizer, config=checkpoint.meta.config, progress=checkpoint.meta.progress)
    return out


def test_a_bundle_takes_the_heads_of_its_encoder(own_checkpoint: Path, bundle: Path, tmp_path: Path) -> None:
    before = Bundle.load(bundle)
    assert main([str(own_checkpoint), str(tmp_path / "heads"), "--heads-only"]) == 0
    assert {path.name for path in (tmp_path / "heads").iterdir()} == {"heads.json", "attribute_heads.onnx"}
    assert replace([str(bundle), str(tmp_path / "heads"), "--new-vocabulary"]) == 0
    after = Bundle.load(bundle)
    assert after.vocabulary == OWN
    assert after.model_hash == before.model_hash
    assert not (bundle / "report.html").exists()
    model = load_checkpoint(own_checkpoint).model
    image_tokens, ids, mask = query_inputs(model, 5, 7)
    with torch.inference_mode():
        expected = model.encode_query(image_tokens, ids, mask)
    fused = after.session(QUERY_ENCODER, provider="cpu").run(
        image_tokens=image_tokens.numpy(), input_ids=ids.numpy(), attention_mask=mask.numpy()
    )
    base = fused.pop("base_query")
    read = after.session(ATTRIBUTE_HEADS, provider="cpu").run(**fused, attention_mask=mask.numpy())
    for found, wanted in ((base, expected.base_query), (read["sub_queries"], expected.sub_queries)):
        np.testing.assert_allclose(found, wanted.numpy(), rtol=0, atol=5e-5)
    np.testing.assert_allclose(read["attribute_weights"], expected.attribute_weights.numpy(), rtol=0, atol=5e-5)


@pytest.mark.parametrize("precision", ["f32", "f16", pytest.param("int8", marks=pytest.mark.slow)])
def test_into_a_bundle_of_any_precision(
    precision: str, own_checkpoint: Path, checkpoint_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    garments = write_tiny_garments(tmp_path / "garments")
    assert main([str(checkpoint_path), str(tmp_path / "bundle"), "--precision", precision]) == 0
    before = {file.name: file.read_bytes() for file in (tmp_path / "bundle").glob("*.onnx")}
    given = [str(own_checkpoint), "--heads-only", "--bundle", str(tmp_path / "bundle"), "--data", str(garments), "--new-vocabulary"]
    capsys.readouterr()
    assert main(given) == 0
    assert "recall@10" in (printed := capsys.readouterr().out)
    assert "bundle  colour, neckline, fabric; the encoder and indexes made with it stay as they are" in printed
    manifest = Bundle.load(tmp_path / "bundle").manifest
    assert manifest.retrieval is not None
    assert {p.graph for p in manifest.parity} == {*(spec.name for spec in GRAPHS), "composed_query"}
    assert all(set(p.outputs) for p in manifest.parity)
    changed = {file.name for file in (tmp_path / "bundle").glob("*.onnx") if file.read_bytes() != before[file.name]}
    assert changed == {ATTRIBUTE_HEADS.file}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "garments"]


def test_another_encoder_is_refused(checkpoint_path: Path, bundle: Path, tmp_path: Path) -> None:
    """By a millionth in one tensor."""
    other = with_heads(checkpoint_path, load_checkpoint(checkpoint_path).vocabulary, tmp_path / "other", encoder_too=True)
    before = Bundle.load(bundle).manifest
    with pytest.raises(InputError, match="trained on another encoder"):
        export_heads_into(load_checkpoint(other), bundle)
    assert Bundle.load(bundle).manifest == before


def test_heads_that_are_not_pytorchs_are_refused(
    checkpoint_path: Path, bundle: Path, bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def edit(name: str, proto: object) -> None:
        change_weight(proto, "model.attribute_heads.seeds", lambda values: values[::-1].copy())  # type: ignore[arg-type]

    monkeypatch.setattr(torch.onnx, "export", replay(bundle_path, edit))
    checkpoint, before = load_checkpoint(checkpoint_path), Bundle.load(bundle).manifest
    with pytest.raises(ParityError, match="attribute_heads: sub_queries differs from PyTorch"):
        export_heads(checkpoint, tmp_path / "heads")
    with pytest.raises(ParityError, match="attribute_heads: sub_queries differs from PyTorch"):
        export_heads_into(checkpoint, bundle)
    assert Bundle.load(bundle).manifest == before
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_an_encoder_that_is_not_pytorchs_is_noticed(checkpoint_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The heads are right by themselves, and the bundle's query encoder is not what it says: the composed query tells."""
    checkpoint = load_checkpoint(checkpoint_path)
    lying = dataclasses.replace(checkpoint, model=_shifted(checkpoint.model))
    monkeypatch.setattr("dqe_export.heads.encoder_identity", lambda checkpoint: Bundle.load(bundle).manifest.encoder_hash)
    before = Bundle.load(bundle).manifest
    with pytest.raises(ParityError, match="the composed query differs from PyTorch"):
        export_heads_into(lying, bundle)
    assert Bundle.load(bundle).manifest == before


def _shifted(model: DQEModel) -> DQEModel:
    with torch.no_grad():
        model.query_tokens[0, 0, 0] += 0.5
    return model


def test_packed_heads_are_replaced_only_with_force(
    own_checkpoint: Path, checkpoint_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(own_checkpoint), str(tmp_path / "heads"), "--heads-only"]
    assert main(given) == 0
    assert main(given) == 2
    assert "heads: exists already" in capsys.readouterr().err
    assert main([str(checkpoint_path), str(tmp_path / "heads"), "--heads-only", "--force"]) == 0
    assert load_heads(tmp_path / "heads").vocabulary == load_checkpoint(checkpoint_path).vocabulary


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["CKPT", "--heads-only"], "takes a checkpoint, and either a folder to write or --bundle BUNDLE"),
        (["CKPT", "OUT", "--heads-only", "--bundle", "BUNDLE"], "takes a checkpoint, and either a folder to write or --bundle BUNDLE"),
        (["CKPT", "OUT", "--heads-only", "--trt"], "--heads-only builds no engines"),
        (["CKPT", "OUT", "--heads-only", "--data", "DATA"], "--data and --new-vocabulary need a bundle"),
        (["CKPT", "OUT", "--heads-only", "--precision", "auto"], "--precision auto chooses for whole bundles"),
        (["CKPT", "--heads-only", "--bundle", "BUNDLE", "--precision", "f16"], "--precision is the bundle's"),
        (["CKPT", "OUT", "--new-vocabulary"], "--new-vocabulary goes with --heads-only"),
        (["CKPT", "--heads-only", "--bundle", "BUNDLE"], "BUNDLE: no bundle here"),
        (["OUT", "HEADS", "--heads-only"], "OUT: not a checkpoint"),
    ],
)
def test_mistakes(
    given: list[str],
    message: str,
    checkpoint_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([str(checkpoint_path) if word == "CKPT" else word for word in given]) == 2
    (error,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert message in error
    assert list(tmp_path.iterdir()) == []
