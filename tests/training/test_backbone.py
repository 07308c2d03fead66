"""BLIP-2 checkpoints: described exactly, loaded completely, computing what upstream computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.samples import noise_image
from support.tiny_blip2 import config_of, model_of, write_blip2
from support.tiny_training import train_config
from torch.nn import functional as F
from transformers import Blip2Config, Blip2ForImageTextRetrieval, Blip2QFormerConfig, Blip2VisionConfig

from dqe_engine.contracts.preprocessing import CLIP_MEAN, CLIP_STD, PreprocessingSpec
from dqe_engine.contracts.tokenizer import TokenizerSpec
from dqe_engine.contracts.vocabulary import PAPER_VOCABULARY
from dqe_engine.preprocessing import preprocess
from dqe_engine.text import TextEncoder
from dqe_training.backbone import describe_backbone
from dqe_training.backbone.describe import UpstreamConfig, UpstreamQFormer, UpstreamVision
from dqe_training.backbone.tokenizer import load_backbone_tokenizer
from dqe_training.backbone.weights import INDEX, NEW, UNUSED
from dqe_training.checkpointing.checkpoint import Progress, load_checkpoint, save_checkpoint
from dqe_training.model import DQEModel, paired_score
from dqe_training.run.configuration import load_config
from dqe_training.run.workflow import build_model, make_tokenizer, vision_dtype

Upstream = Blip2ForImageTextRetrieval
TEXTS = ("is red", "make it a longer dress and has stripes", "red")


@pytest.fixture(scope="module")
def model(published: tuple[Path, Upstream]) -> DQEModel:
    return model_of(published[0])


# -- at full size, without memory ------------------------------------------------------------------------------------------

# What config.json of each says, beside the defaults: Salesforce/blip2-itm-vit-g and -coco; ViT-L as LAVIS sizes it.
SIZES: dict[str, dict[str, Any]] = {
    "vit-g": {},
    "vit-g-coco": {"image_size": 364},
    "vit-l": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    "vit-l without its last layer": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "qkv_bias": False},
}


def write_description(directory: Path, vision: dict[str, Any]) -> Path:
    size = vision.get("image_size", 224)
    config = {
        "architectures": ["Blip2ForImageTextRetrieval"],
        "vision_config": vision,
        "qformer_config": {"vocab_size": 30523, "use_qformer_text_input": True},
    }
    (directory / "config.json").write_text(json.dumps(config))
    processor = {"size": {"height": size, "width": size}, "image_mean": CLIP_MEAN, "image_std": CLIP_STD, "resample": 3}
    (directory / "preprocessor_config.json").write_text(json.dumps(processor))
    return directory


@pytest.mark.parametrize("name", SIZES)
def test_every_key_of_a_full_size_checkpoint_has_its_place(name: str, tmp_path: Path) -> None:
    description = describe_backbone(write_description(tmp_path, SIZES[name]))
    with torch.device("meta"):
        upstream = Upstream(Blip2Config(vision_config=SIZES[name], qformer_config={"vocab_size": 30523, "use_qformer_text_input": True}))
        ours = DQEModel(description, PAPER_VOCABULARY, 0)
    theirs = {key: tuple(value.shape) for key, value in upstream.state_dict().items()}
    wanted = {key: tuple(value.shape) for key, value in ours.state_dict().items()}
    unexpected = {key for key in theirs if key not in wanted and key not in UNUSED}
    missing = {key for key in wanted if key not in theirs and not key.startswith(NEW)}
    assert (unexpected, missing) == (set(), set())
    assert {key: shape for key, shape in wanted.items() if key in theirs} == {key: shape for key, shape in theirs.items() if key in wanted}
    assert {key for key in theirs if key in UNUSED} == {"itm_head.weight", "itm_head.bias"}
    for part in ("vision_model", "qformer"):
        a, b = getattr(ours, part).config, getattr(upstream, part).config
        for key in ("hidden_act", "layer_norm_eps", "num_attention_heads", "intermediate_size"):
            assert getattr(a, key) == getattr(b, key), (part, key)
    assert sum(p.numel() for p in ours.vision_model.parameters()) > (9.8e8 if "vit-g" in name else 2.8e8)
    assert ours.sizes.image_tokens == 1 + (SIZES[name].get("image_size", 224) // 14) ** 2


def test_absent_keys_mean_upstreams_defaults() -> None:
    pairs = [(UpstreamVision(), Blip2VisionConfig()), (UpstreamQFormer(), Blip2QFormerConfig()), (UpstreamConfig(), Blip2Config())]
    for ours, theirs in pairs:
        for name in ours.__struct_fields__:
            if name not in ("architectures", "vision_config", "qformer_config"):
                assert getattr(ours, name) == getattr(theirs, name), name


# -- the same numbers ------------------------------------------------------------------------------------------------------


def upstream_inputs(directory: Path, model: DQEModel) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tokenizer = load_backbone_tokenizer(directory, model.config.qformer.vocab_size)
    tokenizer.enable_padding(pad_id=0, pad_token="[PAD]")
    encodings = tokenizer.encode_batch(list(TEXTS))
    pixels = preprocess([noise_image(seed) for seed in range(len(TEXTS))], model.config.preprocessing)
    return torch.from_numpy(pixels), torch.tensor([e.ids for e in encodings]), torch.tensor([e.attention_mask for e in encodings])


@torch.inference_mode()
def test_image_text_similarity_is_upstreams(published: tuple[Path, Upstream], model: DQEModel) -> None:
    """ITC: max over target tokens of their product with the text's [CLS], which upstream's Q-Former makes without an image."""
    pixels, ids, mask = upstream_inputs(published[0], model)
    expected = published[1](pixel_values=pixels, input_ids=ids, attention_mask=mask, use_image_text_matching_head=False)
    targets = model.encode_targets(model.encode_images(pixels))
    torch.testing.assert_close(targets, expected.image_embeds, rtol=0, atol=1e-5)
    hidden = model.qformer(query_embeds=model.embeddings(ids), query_length=0, attention_mask=mask).last_hidden_state
    texts = F.normalize(model.text_projection(hidden[:, 0]), dim=-1)
    torch.testing.assert_close(texts, expected.text_embeds, rtol=0, atol=1e-5)
    scores = torch.stack([paired_score(text.expand(len(targets), -1), targets) for text in texts], dim=1)
    torch.testing.assert_close(scores, expected.logits_per_image, rtol=0, atol=1e-5)
    assert expected.logits_per_image.std() > 0.05  # random, but not all alike


@torch.inference_mode()
def test_the_base_query_is_upstreams_fusion(published: tuple[Path, Upstream], model: DQEModel) -> None:
    upstream = published[1]
    pixels, ids, mask = upstream_inputs(published[0], model)
    image = upstream.vision_model(pixel_values=pixels).last_hidden_state
    torch.testing.assert_close(model.encode_images(pixels), image, rtol=0, atol=1e-5)
    queries = upstream.query_tokens.expand(len(ids), -1, -1)
    count = queries.shape[1]
    fused = upstream.qformer(
        query_embeds=upstream.embeddings(input_ids=ids, query_embeds=queries), query_length=count,
        attention_mask=torch.cat([mask.new_ones(len(ids), count), mask], dim=1), encoder_hidden_states=image,
    ).last_hidden_state  # fmt: skip
    expected = F.normalize(upstream.text_projection(fused[:, :count]).mean(dim=1), dim=-1)
    torch.testing.assert_close(model.encode_query(image, ids, mask).base_query, expected, rtol=0, atol=1e-5)


def test_every_weight_is_loaded_and_the_heads_are_new(published: tuple[Path, Upstream], model: DQEModel) -> None:
    theirs, ours = published[1].state_dict(), model.state_dict()
    for name, value in ours.items():
        assert name.startswith(NEW) or torch.equal(value, theirs[name]), name
    assert set(theirs) - set(ours) == {"itm_head.weight", "itm_head.bias"}
    again = model_of(published[0], "optim.seed=1").state_dict()
    assert not torch.equal(again["attribute_heads.seeds"], ours["attribute_heads.seeds"])


@pytest.mark.parametrize(
    ("optim", "cuda", "expected"),
    [
        ({}, False, torch.float32),
        ({}, True, torch.float16),
        ({"vision_learning_rate": 1e-5}, True, torch.float32),
        ({"vision_precision": "bfloat16"}, False, torch.bfloat16),
        ({"vision_precision": "float32"}, True, torch.float32),
    ],
)
def test_the_towers_precision(optim: dict[str, Any], cuda: bool, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    assert vision_dtype(train_config(**optim)) == expected


def test_a_tower_that_trains_is_not_in_half_precision() -> None:
    with pytest.raises(ValueError, match="kept in float32, got vision_precision float16"):
        train_config(vision_learning_rate=1e-5, vision_precision="float16")


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_a_half_precision_tower(published: tuple[Path, Upstream], model: DQEModel, precision: str) -> None:
    half = model_of(published[0], f"optim.vision_precision={precision}")
    dtypes = {name.partition(".")[0]: value.dtype for name, value in half.state_dict().items()}
    assert dtypes.pop("vision_model") == getattr(torch, precision)
    assert set(dtypes.values()) == {torch.float32}
    pixels = upstream_inputs(published[0], model)[0]
    with torch.inference_mode():
        tokens, expected = half.encode_images(pixels), model.encode_images(pixels)
    assert tokens.dtype == torch.float32
    torch.testing.assert_close(tokens, expected, rtol=0, atol=0.02 if precision == "float16" else 0.2)
    assert not torch.equal(tokens, expected)


def test_a_single_file_is_the_same_checkpoint(published: tuple[Path, Upstream], model: DQEModel, tmp_path: Path) -> None:
    write_blip2(tmp_path, shard_size="1GB")
    assert not (tmp_path / INDEX).exists()
    assert (published[0] / INDEX).exists()
    single = model_of(tmp_path).state_dict()
    assert all(torch.equal(value, single[name]) for name, value in model.state_dict().items())


def test_buffers_that_older_versions_stored_are_passed_over(tmp_path: Path) -> None:
    write_blip2(tmp_path, shard_size="1GB")
    weights = load_file(tmp_path / "model.safetensors")
    positions = torch.arange(40)[None]
    save_file(
        weights | {"embeddings.position_ids": positions, "qformer.embeddings.position_ids": positions.clone()},
        tmp_path / "model.safetensors",
    )
    model_of(tmp_path)


def test_only_one_tensor_at_a_time_is_read(published: tuple[Path, Upstream], monkeypatch: pytest.MonkeyPatch) -> None:
    """The tower is never initialised at random nor held in float32 where it is wanted in half precision."""
    made: list[torch.device] = []
    from dqe_training.model import dqe

    build = dqe.build_vision

    def spy(config: Any) -> Any:
        tower = build(config)
        made.append(next(tower.parameters()).device)
        return tower

    monkeypatch.setattr(dqe, "build_vision", spy)
    model_of(published[0])
    assert made == [torch.device("meta")]


# -- the description -------------------------------------------------------------------------------------------------------


def test_sizes_come_from_the_checkpoint(published: tuple[Path, Upstream]) -> None:
    config = config_of(published[0])
    vision, q = config.model.vision, config.model.qformer
    assert (vision.hidden_size, vision.mlp_width, vision.layers, vision.patch_size, vision.layer_norm_eps) == (24, 100, 2, 8, 1e-3)
    assert (q.query_tokens, q.embedding_dim, q.max_text_length, q.mlp_width, q.dropout, q.layer_norm_eps) == (3, 8, 40, 36, 0.1, 1e-4)
    assert config.model.preprocessing == PreprocessingSpec(image_size=16)
    assert config.backbone == str(published[0])


def test_overrides_stand_over_the_checkpoints_configuration(published: tuple[Path, Upstream]) -> None:
    model = config_of(
        published[0], "model.qformer.max_text_length=12", "model.preprocessing.fit=target_pad", "model.qformer.pooled=true"
    ).model
    assert (model.qformer.max_text_length, model.qformer.position_embeddings, model.qformer.layers) == (12, 40, 3)
    assert (model.preprocessing.fit, model.preprocessing.image_size) == ("target_pad", 16)
    built = model_of(published[0], "model.qformer.max_text_length=12")
    assert built.embeddings.position_embeddings.num_embeddings == 40


def test_a_yaml_file_may_name_the_backbone(published: tuple[Path, Upstream], tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"backbone: {published[0]}\nmodel: {{attribute_weights: false, qformer: {{dropout: 0.0}}}}\n")
    config = load_config(str(path))
    assert (config.model.attribute_weights, config.model.qformer.dropout, config.model.qformer.layers) == (False, 0.0, 3)


def test_the_processors_newer_file(copy: Path) -> None:
    processor = json.loads((copy / "preprocessor_config.json").read_text())
    (copy / "preprocessor_config.json").unlink()
    (copy / "processor_config.json").write_text(json.dumps({"image_processor": processor, "processor_class": "Blip2Processor"}))
    assert describe_backbone(copy).preprocessing == PreprocessingSpec(image_size=16)


# -- the tokenizer ---------------------------------------------------------------------------------------------------------


def test_ids_stay_within_the_embedding_table(published: tuple[Path, Upstream], tmp_path: Path) -> None:
    config = config_of(published[0])
    rows = config.model.qformer.vocab_size
    tokenizer = make_tokenizer(config, ["other texts"])
    assert json.loads((published[0] / "tokenizer.json").read_text())["added_tokens"][-1]["id"] == rows  # <image>, past the table
    assert max(tokenizer.get_vocab().values()) == rows - 1 == tokenizer.token_to_id("[DEC]")
    ids = tokenizer.encode("an <image> of a [DEC] dress").ids
    assert max(ids) < rows
    assert rows - 1 in ids
    long = tokenizer.encode("red " * 700)
    assert len(long.ids) == 702  # what the file says of truncation and padding is not taken over
    assert len({len(e.ids) for e in tokenizer.encode_batch(["red", "is red"])}) == 2
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    encoded = TextEncoder(tmp_path / "tokenizer.json", TokenizerSpec(max_length=40)).encode(["is red", "<image> red"])
    assert encoded.input_ids.max() < rows


def test_a_checkpoint_of_ours_holds_it(published: tuple[Path, Upstream], model: DQEModel, tmp_path: Path) -> None:
    config = config_of(published[0], "optim.vision_precision=float16")
    half = build_model(config, PAPER_VOCABULARY, 0)
    save_checkpoint(tmp_path / "ours", half, make_tokenizer(config, []), config=config, progress=Progress())
    loaded = load_checkpoint(tmp_path / "ours")
    assert loaded.tokenizer.get_vocab() == make_tokenizer(config, []).get_vocab()
    assert loaded.meta.tokenizer.max_length == 40
    for name, value in loaded.model.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, half.state_dict()[name].float()), name
