"""Published files become checkpoints that compute what the files' authors compute."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from support import published_models as files
from support.importing import NAMES, imported, options
from support.published_models import TINY, VIT_G, VIT_G_COCO, VIT_L, Size
from support.tiny_blip2 import write_blip2
from torch.nn import functional as F

from dqe_engine.contracts.preprocessing import CLIP_MEAN, CLIP_STD, PreprocessingSpec
from dqe_engine.contracts.vocabulary import NO_ATTRIBUTES, PAPER_VOCABULARY
from dqe_engine.errors import CheckpointError
from dqe_engine.files import sha256_of
from dqe_training.checkpointing.checkpoint import load_checkpoint, stored_vision_dtype
from dqe_training.checkpointing.encoder_hash import encoder_hash
from dqe_training.checkpointing.meta import WEIGHTS
from dqe_training.cli import import_
from dqe_training.config.schema import VisionConfig
from dqe_training.features.identity import feature_key
from dqe_training.importing import LAYOUTS, ImportOptions, import_model
from dqe_training.importing.formats import base_query
from dqe_training.importing.importer import plan_file
from dqe_training.importing.reading import Stored, WeightFile
from dqe_training.model import DQEModel

CASES = [(layout, kind) for layout in NAMES for kind in TINY]
TEXTS = ("is red", "Make it LONGER, and has the same dots!", "red")


# -- the same numbers ------------------------------------------------------------------------------------------------------


@torch.inference_mode()
@pytest.mark.parametrize(("layout", "kind"), CASES)
def test_an_imported_model_computes_what_its_authors_write_down(layout: str, kind: str, tmp_path: Path) -> None:
    size = TINY[kind]
    checkpoint, state = imported(tmp_path, layout, size)
    model = checkpoint.model
    pixels = torch.randn(4, 3, size.image, size.image)
    tokens = model.encode_images(pixels)
    expected = torch.stack([files.image_tokens(state, size, one) for one in pixels])
    torch.testing.assert_close(tokens, expected, rtol=0, atol=1e-5)
    targets = torch.stack([files.target_tokens(state, size, one) for one in expected])
    torch.testing.assert_close(model.encode_targets(tokens), targets, rtol=0, atol=1e-5)
    texts = [torch.tensor([2, 5, 7, 3]), torch.tensor([2, 9, 3]), torch.tensor([2, 5, 9, 8, 30, 11, 3]), torch.tensor([2, 3])]
    ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)  # of different lengths: padding is not read
    mask = (torch.arange(ids.shape[1]) < torch.tensor([[len(text)] for text in texts])).long()
    queries = torch.stack([files.query(layout, state, size, one, text) for one, text in zip(expected, texts, strict=True)])
    torch.testing.assert_close(model.encode_query(tokens, ids, mask).query, queries, rtol=0, atol=1e-5)
    model.config = msgspec.structs.replace(model.config, base_query="mean")  # the weights' arithmetic, whatever their query is made of
    found = model.fuse_query(tokens, ids, mask)
    for row, text in enumerate(texts):
        whole = files.fused(state, size, expected[row], text)
        torch.testing.assert_close(found.fused_queries[row], whole[: size.queries], rtol=0, atol=2e-5)
        torch.testing.assert_close(found.fused_text[row, : len(text)], whole[size.queries :], rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize(("layout", "kind"), [("sprc", "eva"), ("qure", "clip"), ("spn4cir", "clip"), ("lavis", "eva")])
def test_every_tensor_of_a_file_matters(layout: str, kind: str, tmp_path: Path) -> None:
    """Any that is used, moved, changes image tokens, target tokens or queries: none is passed over in a way that equal numbers hide."""
    checkpoint, _ = imported(tmp_path, layout, TINY[kind])
    model, pixels, ids = checkpoint.model, torch.randn(2, 3, 12, 12), torch.tensor([[2, 9, 5, 3], [2, 7, 6, 3]])

    def answers() -> torch.Tensor:
        tokens = model.encode_images(pixels)
        found = (tokens, model.encode_targets(tokens), model.encode_query(tokens, ids, torch.ones_like(ids)).query)
        return torch.cat([part.flatten() for part in found])

    before = answers()
    read_by_no_output = silent(layout, TINY[kind].layers)
    for name, parameter in model.named_parameters():
        if name == "vision_model.embeddings.patch_embedding.bias" and kind == "clip":
            assert not parameter.any()  # CLIP's convolution has none
        kept = parameter.clone()
        parameter.mul_(2).add_(torch.linspace(-0.3, 0.3, parameter.numel()).reshape(parameter.shape))
        assert ((answers() - before).abs().max() > 1e-5) != (name in read_by_no_output), name
        parameter.copy_(kept)


def silent(layout: str, layers: int) -> set[str]:
    """Weights that change nothing by their arithmetic: keys' biases, which move all scores of a softmax alike, and the last layer's
    texts where queries alone are read after it."""
    last = f"qformer.encoder.layer.{layers - 1}."
    quiet = {f"qformer.encoder.layer.{n}.{part}.attention.key.bias" for n in range(layers) for part in ("attention", "crossattention")}
    quiet |= {f"second_qformer.encoder.layer.{n}.attention.attention.key.bias" for n in range(layers)}
    if layout in ("qure", "spn4cir"):
        parts = ("intermediate.dense", "output.dense", "output.LayerNorm")
        quiet |= {f"{last}{part}.{end}" for part in parts for end in ("weight", "bias")}
    return quiet


@torch.inference_mode()
@pytest.mark.parametrize("form", ["a directory", "a directory of shards", "a file"])
def test_transformers_files_compute_what_transformers_does(form: str, tmp_path: Path) -> None:
    source = tmp_path / "blip2"
    vision = {"layer_norm_eps": 1e-6} if form == "a file" else {}  # no configuration says otherwise there
    upstream = write_blip2(source, shard_size="12KB" if form == "a directory of shards" else "1GB", vision=vision)
    given = ImportOptions()
    if form == "a file":
        upstream.qformer.layernorm.eps = 1e-12
        for module in upstream.qformer.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.eps = 1e-12
        given = ImportOptions(tokenizer=str(source), vision_heads=2, qformer_heads=2)
        source = source / "model.safetensors"
    plan, meta = import_model(source, tmp_path / "out", given)
    assert plan.layout.name == "transformers"
    assert set(plan.unused) == {"itm_head.weight", "itm_head.bias"}
    model = load_checkpoint(tmp_path / "out").model
    pixels, ids = torch.randn(3, 3, 16, 16), torch.randint(4, 60, (3, 6))
    mask = torch.ones_like(ids)
    expected = upstream(pixel_values=pixels, input_ids=ids, attention_mask=mask, use_image_text_matching_head=False)
    torch.testing.assert_close(model.encode_targets(model.encode_images(pixels)), expected.image_embeds, rtol=0, atol=1e-5)
    assert meta.imported is not None
    assert len(meta.imported.files) == (1 if form != "a directory of shards" else len(plan.files))


def test_the_epsilon_after_evas_tower_is_lavis_own(tmp_path: Path) -> None:
    """1e-5 on `ln_vision`, where the tower has 1e-6: seen as soon as a token varies little."""
    checkpoint, _ = imported(tmp_path, "lavis", TINY["eva"])
    tower = checkpoint.model.vision_model
    assert (tower.post_layernorm.eps, tower.encoder.layers[0].layer_norm1.eps) == (1e-5, 1e-6)
    small = torch.randn(1, 24) * 1e-3
    with torch.no_grad():
        assert (
            tower.post_layernorm(small)
            .sub(F.layer_norm(small, (24,), tower.post_layernorm.weight, tower.post_layernorm.bias, 1e-6))
            .abs()
            .max()
            > 0.1
        )


# -- at full size, without memory ------------------------------------------------------------------------------------------


def on_paper(layout: str, size: Size, *, wrapper: str) -> WeightFile:
    def read() -> torch.Tensor:
        raise AssertionError("a value was read")

    shapes = files.shapes_of(layout, size)
    tensors = {name: Stored(shape, torch.float32, read) for name, shape in shapes.items()}
    tensors["Qformer.bert.embeddings.position_ids"] = Stored((1, size.positions), torch.int64, read)
    return WeightFile(Path(NAMES[layout]), wrapper, tensors)


@pytest.mark.parametrize(
    ("layout", "wrapper", "size"),
    [
        ("sprc", "Blip2QformerCirAlignPrompt", VIT_G), ("sprc", "Blip2QformerCirAlignPrompt", VIT_L), ("qure", "", VIT_L),
        ("qure", "", VIT_G), ("spn4cir", "state_dict", VIT_G),
        ("lavis", "model", VIT_G), ("lavis", "model", VIT_G_COCO), ("lavis", "model", VIT_L),
    ],
    ids=["SPRC ViT-g", "SPRC ViT-L", "QuRe ViT-L", "QuRe ViT-g", "SPN4CIR ViT-g", "LAVIS ViT-g", "LAVIS ViT-g coco", "LAVIS ViT-L"],
)  # fmt: skip
def test_every_key_and_shape_of_a_published_size(layout: str, wrapper: str, size: Size) -> None:
    plan = plan_file(on_paper(layout, size, wrapper=wrapper), ImportOptions())
    assert plan.layout.name == layout
    used = {source for move in plan.moves.made.values() for source in move.sources}
    assert used | set(plan.unused) == set(plan.tensors)
    left_out = {"temp", "itm_head.weight", "itm_head.bias", "Qformer.bert.embeddings.position_ids"}
    left_out |= {name for name in plan.tensors if name.startswith("Qformer.cls.")} | set(files.shapes_of(layout, size)) & {"prompt_tokens"}
    if layout == "spn4cir":
        parts = (".cls.", ".crossattention.", "_query.dense.", "_query.LayerNorm.")
        second = {name for name in plan.tensors if name.startswith("Qformer_query.") and any(part in name for part in parts)}
        left_out |= second | {"text_proj.weight", "text_proj.bias"}
    assert set(plan.unused) == left_out
    v, q, p = plan.model.vision, plan.model.qformer, plan.model.preprocessing
    assert (v.hidden_size, v.layers, v.heads, v.mlp_width, v.patch_size) == (size.width, size.depth, 16, size.mlp, 14)
    assert v == VisionConfig(
        hidden_size=v.hidden_size, layers=v.layers, heads=16, mlp_size=v.mlp_size, patch_size=14,
        **({"layer_norm_eps": 1e-6, "final_norm_eps": 1e-5} if size.kind == "eva" else {}),
        **({"layer_norm_eps": 1e-5, "activation": "quick_gelu", "pre_norm": True} if size.kind == "clip" else {}),
    )  # fmt: skip
    assert (q.hidden_size, q.layers, q.heads, q.mlp_width, q.query_tokens, q.embedding_dim) == (768, 12, 12, 3072, 32, 256)
    assert (q.cross_attention_frequency, q.max_text_length, q.vocab_size, q.position_embeddings) == (2, 32, 30523, 512)
    assert p.image_size == size.image
    with torch.device("meta"):
        made = DQEModel(plan.model, PAPER_VOCABULARY, 0)
    assert sum(n.numel() for n in made.vision_model.parameters()) > (9.8e8 if size.kind == "eva" else 2.8e8)


# -- what is written -------------------------------------------------------------------------------------------------------


def test_preprocessing_is_the_authors(tmp_path: Path) -> None:
    for layout, kind in (("lavis", "eva"), ("sprc", "eva"), ("qure", "clip")):
        folder = tmp_path / layout
        folder.mkdir()
        checkpoint, _ = imported(folder, layout, TINY[kind])
        model, tokenizer = checkpoint.meta.config.model, checkpoint.meta.tokenizer
        crop = PreprocessingSpec(
            image_size=12, fit="target_pad_crop", target_ratio=1.25, background=(0, 0, 0), mean=CLIP_MEAN, std=CLIP_STD
        )
        assert model.preprocessing == (PreprocessingSpec(image_size=12) if layout == "lavis" else crop)
        assert (tokenizer.max_length, tokenizer.captions) == (32, "blip")
        assert checkpoint.tokenizer.token_to_id("[DEC]") == TINY[kind].words - 1
        assert (model.attribute_weights, model.base_query) == (False, base_query(LAYOUTS[layout])[0])
        assert checkpoint.vocabulary == NO_ATTRIBUTES


def test_where_it_comes_from_is_recorded(tmp_path: Path) -> None:
    checkpoint, _ = imported(tmp_path, "qure", TINY["clip"])
    source, found = tmp_path / "model.pth", checkpoint.meta.imported
    assert found is not None
    assert found.format == "qure"
    assert [(f.name, f.size, f.sha256) for f in found.files] == [("model.pth", source.stat().st_size, sha256_of(source))]
    assert "no licence" in found.licence
    assert found.deviations == ()


def test_a_query_that_this_version_cannot_compose_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    later = replace(LAYOUTS["sprc"], queries="of a later version")
    monkeypatch.setitem(LAYOUTS, "sprc", later)  # type: ignore[arg-type]
    checkpoint, _ = imported(tmp_path, "sprc", TINY["eva"])
    assert checkpoint.meta.imported is not None
    (sentence,) = checkpoint.meta.imported.deviations
    assert "'of a later version'" in sentence


def test_the_command_offers_every_layout() -> None:
    assert set(import_.FORMATS) == set(LAYOUTS)


def test_values_and_their_precision_are_the_files(tmp_path: Path) -> None:
    """A tower whose matrices are in half precision takes no more room than in the file, and loses no bit."""
    checkpoint, state = imported(tmp_path, "sprc", TINY["eva"], half_tower=True)
    with safe_open(tmp_path / "out" / WEIGHTS, framework="pt") as stored:
        theirs = state["visual_encoder.blocks.1.mlp.fc2.weight"]
        ours = stored.get_tensor("vision_model.encoder.layers.1.mlp.fc2.weight")
        assert ours.dtype == theirs.dtype == torch.float16
        assert torch.equal(ours, theirs)
        assert stored.get_tensor("vision_model.encoder.layers.1.layer_norm1.weight").dtype == torch.float32
    assert stored_vision_dtype(tmp_path / "out") == torch.float32
    assert checkpoint.model.vision_model.encoder.layers[0].mlp.fc1.weight.dtype == torch.float32
    assert encoder_hash(tmp_path / "out") == encoder_hash(checkpoint)


def test_a_towers_own_file(tmp_path: Path) -> None:
    """Beside a Q-Former without one, with the block and the end that BLIP-2 does not run, at the published width."""
    for kind, extra in (("eva", ("norm.weight", "head.weight", "fc_norm.bias")), ("clip", ("ln_post.weight", "ln_post.bias", "proj"))):
        published = VIT_G if kind == "eva" else VIT_L
        size = replace(
            published,
            depth=published.depth + 1,
            image=28,
            mlp=8,
            hidden=16,
            layers=1,
            words=40,
            joint=8,
            queries=2,
            qformer_heads=2,
            qformer_mlp=8,
        )
        tower = {name: Stored(shape, torch.float32, torch.Tensor) for name, shape in files.tower_shapes(size).items()}
        tower |= {name: Stored((size.width,), torch.float32, torch.Tensor) for name in extra}
        rest = {name: Stored(shape, torch.float32, torch.Tensor) for name, shape in files.qformer_shapes(size).items()}
        path = tmp_path / f"{kind}.pth"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("dqe_training.importing.importer.open_weights", lambda p, tower=tower: WeightFile(p, "", tower))
            plan = plan_file(WeightFile(tmp_path / "b.pth", "model", rest), ImportOptions(tower=path, qformer_heads=2))
        assert plan.model.vision.layers == published.depth
        assert plan.files == [tmp_path / "b.pth", path]
        last = "blocks.39." if kind == "eva" else "transformer.resblocks.23."
        reasons = {name.removeprefix("visual_encoder."): why for name, why in plan.unused.items()}
        assert all("last block" in reasons[name] for name in tower if name.startswith(last))
        assert all("own training" in reasons[name] for name in extra)


def test_a_tower_beside_its_file_is_the_same_model(tmp_path: Path) -> None:
    size = TINY["clip"]
    whole, state = imported(tmp_path, "lavis", size)
    prefix = "visual_encoder."
    torch.save({"model": {n: v for n, v in state.items() if not n.startswith(prefix)}}, tmp_path / "q.pth")
    torch.save({n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}, tmp_path / "tower.pth")
    _, meta = import_model(tmp_path / "q.pth", tmp_path / "two", options(tmp_path, size, tower=tmp_path / "tower.pth"))
    assert encoder_hash(tmp_path / "two") == encoder_hash(whole)
    assert meta.imported is not None
    assert [file.name for file in meta.imported.files] == ["q.pth", "tower.pth"]


def test_towers_of_other_kinds_have_other_feature_keys(tmp_path: Path) -> None:
    """Equal weights under another LayerNorm are another tower to the cache; a tower without either keeps its key."""
    checkpoint, _ = imported(tmp_path, "lavis", TINY["eva"])
    model = checkpoint.model
    key = feature_key(model)
    model.config = msgspec.structs.replace(model.config, vision=msgspec.structs.replace(model.config.vision, final_norm_eps=0.0))
    assert feature_key(model) != key


def test_safetensors_of_lavis_names_are_taken_too(tmp_path: Path) -> None:
    size = TINY["clip"]
    state = files.save("qure", tmp_path / "a.pth", size)
    save_file(state, tmp_path / "a.safetensors")
    for name in ("a.pth", "a.safetensors"):
        import_model(tmp_path / name, tmp_path / name[2:], options(tmp_path, size))
    assert encoder_hash(tmp_path / "pth") == encoder_hash(tmp_path / "safetensors")


def test_a_format_may_be_named(tmp_path: Path) -> None:
    """A bare dictionary of LAVIS's names is QuRe's, until somebody says otherwise."""
    size = TINY["eva"]
    files.save("qure", tmp_path / "a.pth", size)
    plan, _ = import_model(tmp_path / "a.pth", tmp_path / "out", options(tmp_path, size, layout="lavis"))
    assert plan.layout.name == "lavis"


def test_spn4cirs_first_stage_is_sprcs(tmp_path: Path) -> None:
    """A file without a second Q-Former is SPRC's, under SPN4CIR's names, too."""
    size = TINY["eva"]
    state = files.save("sprc", tmp_path / "a.pth", size)
    torch.save({"epoch": 1, "state_dict": {f"blip_model.{name}": value for name, value in state.items()}}, tmp_path / "b.pth")
    plans = [import_model(tmp_path / name, tmp_path / "out", options(tmp_path, size), force=True)[0] for name in ("a.pth", "b.pth")]
    assert [plan.layout.name for plan in plans] == ["sprc", "sprc"]
    with pytest.raises(CheckpointError, match=r"a\.pth: no second Q-Former in it \(no Qformer_query\.\*\).*--format sprc"):
        import_model(tmp_path / "a.pth", tmp_path / "out", options(tmp_path, size, layout="spn4cir"), force=True)


def test_the_command_says_what_it_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = TINY["clip"]
    files.save("sprc", tmp_path / "sprc_cirr_vitl.pt", size)
    vocabulary = files.write_vocabulary(tmp_path / "vocab.txt", size.words)
    arguments = [str(tmp_path / "sprc_cirr_vitl.pt"), str(tmp_path / "out"), "--tokenizer", str(vocabulary), "--vision-heads", "4"]
    assert import_.main([*arguments, "--qformer-heads", "2"]) == 0
    said = capsys.readouterr().out
    for part in ("--format sprc", "CLIP's, with a LayerNorm", "12 pixels", "1: SPRC's prompt tokens", "licence: ", "next: dqe-export"):
        assert part in said
    assert import_.main([*arguments, "--qformer-heads", "2"]) != 0
    assert "exists already" in capsys.readouterr().err
