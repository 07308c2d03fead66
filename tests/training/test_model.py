"""The model: shapes, norms, what depends on what, and parity with transformers' own modules."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from support.tiny_training import make_model, model_config, query_inputs, train_config
from torch.nn import functional as F

from dqe_engine.compose import compose_query
from dqe_engine.contracts.vocabulary import Attribute, AttributeVocabulary
from dqe_engine.errors import CheckpointError
from dqe_training.data.garments.catalog import vocabulary
from dqe_training.model import DQEModel
from dqe_training.model.vision import eager_attention
from dqe_training.pretrain import PretrainConfig, pretrain_from_dataset
from dqe_training.run.workflow import build_model, load_vision

VARIANTS = {
    "plain": model_config(),
    "pooled": model_config(pooled=True),
    "deep": model_config(layers=3, cross_attention_frequency=2, heads=4, query_tokens=5),
    "without LAW": model_config(attribute_weights=False),
    "cls": model_config(base_query="cls"),
    "pool, and weights that see": model_config(base_query="pool", weights_from="text+image"),
    "constant weights": model_config(weights_from="constant"),
    "two passes": model_config(base_query="two_pass", layers=3, cross_attention_frequency=2),
    "zero shot": model_config(base_query="zero_shot", text_share=0.3),
}


@pytest.fixture(params=VARIANTS)
def model(request: pytest.FixtureRequest) -> DQEModel:
    return make_model(VARIANTS[request.param])


def assert_unit(rows: torch.Tensor) -> None:
    torch.testing.assert_close(rows.norm(dim=-1), torch.ones(rows.shape[:-1]), rtol=0, atol=1e-5)


def test_eager_attention_is_the_same_and_ends() -> None:
    tower = make_model().vision_model
    side = tower.config.image_size
    pixels = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(0))
    calls = []
    with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
        attention = F.scaled_dot_product_attention
        patch.setattr(F, "scaled_dot_product_attention", lambda *a, **o: (calls.append(1), attention(*a, **o))[1])
        trained = tower(pixels).last_hidden_state
        assert len(calls) == tower.config.num_hidden_layers
        with eager_attention(tower):
            torch.testing.assert_close(tower(pixels).last_hidden_state, trained, rtol=0, atol=1e-5)
        assert len(calls) == tower.config.num_hidden_layers
        assert torch.equal(tower(pixels).last_hidden_state, trained)
    assert len(calls) == 2 * tower.config.num_hidden_layers


@pytest.mark.parametrize("batch", [1, 5])
def test_shapes_and_unit_norms(model: DQEModel, batch: int) -> None:
    sizes, q = model.sizes, model.config.qformer
    pixels = torch.randn(batch, 3, sizes.image_size, sizes.image_size)
    with torch.inference_mode():
        image_tokens = model.encode_images(pixels)
        targets = model.encode_targets(image_tokens)
        output = model.encode_query(image_tokens, *query_inputs(model, batch, 6)[1:])
    assert sizes.target_tokens == (1 if q.pooled else q.query_tokens)
    assert image_tokens.shape == (batch, sizes.image_tokens, sizes.vision_width) == (batch, 1 + (16 // 8) ** 2, 16)
    assert targets.shape == (batch, sizes.target_tokens, q.embedding_dim)
    assert output.query.shape == output.base_query.shape == (batch, q.embedding_dim)
    assert output.sub_queries.shape == (batch, 4, q.embedding_dim)
    assert output.attribute_weights.shape == output.presence.shape == (batch, 4)
    for rows in (targets, output.query, output.base_query, *([output.sub_queries] if model.config.attribute_weights else [])):
        assert_unit(rows)
    assert model.config.attribute_weights or not output.sub_queries.any()
    assert (output.attribute_weights >= 0).all()


def test_the_pooled_target_is_the_direction_of_the_mean_token() -> None:
    model, pooled = make_model(), make_model(model_config(pooled=True))
    tokens = query_inputs(model, 3, 4)[0]
    with torch.inference_mode():
        mean = F.normalize(model.encode_targets(tokens).mean(dim=1, keepdim=True), dim=-1)
        torch.testing.assert_close(pooled.encode_targets(tokens), mean)


def test_the_query_is_what_the_runtime_composes(model: DQEModel) -> None:
    with torch.inference_mode():
        output = model.encode_query(*query_inputs(model, 7, 9))
    composed = compose_query(output.base_query.numpy(), output.sub_queries.numpy(), output.attribute_weights.numpy())
    np.testing.assert_allclose(output.query.numpy(), composed, rtol=0, atol=1e-6)


def test_without_attribute_weights_the_query_is_the_base_query() -> None:
    model = make_model(VARIANTS["without LAW"])
    with torch.inference_mode():
        output = model.encode_query(*query_inputs(model, 4, 5))
    assert (output.attribute_weights == 0).all()
    torch.testing.assert_close(output.query, output.base_query, rtol=0, atol=1e-7)
    with torch.inference_mode():
        composed = make_model().encode_query(*query_inputs(model, 4, 5))
    assert (composed.query - composed.base_query).abs().max() > 0.01  # so that the check above says something


def test_padding_changes_nothing(model: DQEModel) -> None:
    tokens, ids, mask = query_inputs(model, 5, 7)
    longer, longer_mask = (F.pad(t, (0, 11)) for t in (ids, mask))
    garbage = torch.where(longer_mask == 0, 17, longer)  # whatever stands under the padding
    with torch.inference_mode():
        short, long = model.encode_query(tokens, ids, mask), model.encode_query(tokens, garbage, longer_mask)
    for name, a, b in zip(short._fields, short, long, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5, msg=name)


def test_the_batch_changes_nothing(model: DQEModel) -> None:
    tokens, ids, mask = query_inputs(model, 6, 7)
    with torch.inference_mode():
        together = model.encode_query(tokens, ids, mask)
        targets = model.encode_targets(tokens)
        for row in range(6):
            length = int(mask[row].sum())
            alone = model.encode_query(tokens[row : row + 1], ids[row : row + 1, :length], mask[row : row + 1, :length])
            for name, a, b in zip(together._fields, together, alone, strict=True):
                torch.testing.assert_close(a[row : row + 1], b, rtol=0, atol=1e-5, msg=name)
            torch.testing.assert_close(model.encode_targets(tokens[row : row + 1]), targets[row : row + 1], rtol=0, atol=1e-5)


def test_attribute_weights_depend_on_the_text_alone() -> None:
    model = make_model()
    tokens, ids, mask = query_inputs(model, 4, 6)
    same_text = ids[:1].expand(4, -1), mask[:1].expand(4, -1)
    with torch.inference_mode():
        images_differ = model.encode_query(tokens, *same_text)
        texts_differ = model.encode_query(tokens[:1].expand(4, -1, -1), ids, mask)
    assert (images_differ.attribute_weights == images_differ.attribute_weights[0]).all()
    assert (images_differ.base_query[1:] - images_differ.base_query[0]).abs().amax(dim=1).min() > 1e-3
    assert (texts_differ.attribute_weights[1:] - texts_differ.attribute_weights[0]).abs().amax(dim=1).min() > 1e-4
    assert (texts_differ.base_query[1:] - texts_differ.base_query[0]).abs().amax(dim=1).min() > 1e-3


def test_weights_that_see_depend_on_text_and_image() -> None:
    model = make_model(VARIANTS["pool, and weights that see"])
    tokens, ids, mask = query_inputs(model, 4, 6)
    with torch.inference_mode():
        images_differ = model.encode_query(tokens, ids[:1].expand(4, -1), mask[:1].expand(4, -1)).attribute_weights
        texts_differ = model.encode_query(tokens[:1].expand(4, -1, -1), ids, mask).attribute_weights
    for differ in (images_differ, texts_differ):
        assert (differ[1:] - differ[0]).abs().amax(dim=1).min() > 1e-4


def test_constant_weights_are_half_the_gain_whatever_is_asked() -> None:
    """They still compose the query, and all other weights of the seed are those of a model whose weights read the text."""
    model = make_model(VARIANTS["constant weights"])
    with torch.inference_mode():
        output = model.encode_query(*query_inputs(model, 4, 6))
        half = F.softplus(model.attribute_heads.gain) / np.log(2) / 2
    torch.testing.assert_close(output.attribute_weights, half.expand(4, -1), rtol=1e-5, atol=1e-6)
    states = []
    for name in ("plain", "constant weights"):
        torch.manual_seed(0)
        states.append(DQEModel(VARIANTS[name], vocabulary(), 200).state_dict())
    plain, constant = states
    assert {name.split(".")[1] for name in set(plain) - set(constant)} == {"word_norm", "presence"}
    assert all(torch.equal(plain[name], value) for name, value in constant.items())


def test_what_a_variant_adds_leaves_the_other_weights_of_the_seed() -> None:
    states = []
    for name in ("plain", "pool, and weights that see"):
        torch.manual_seed(0)
        states.append(DQEModel(VARIANTS[name], vocabulary(), 200).state_dict())
    plain, more = states
    assert set(more) - set(plain) == {f"base_pool.{name}" for name in ("seeds", "key.weight", "key.bias", "projection")} | {
        f"attribute_heads.{name}" for name in ("seen_norm.weight", "seen_norm.bias", "seen.weight")
    }
    for name, value in plain.items():
        assert torch.equal(more[name], value), name


def test_base_queries() -> None:
    """Each is read off the fused tokens by its own definition; the pool's weights have no part in the others."""
    pool = make_model(VARIANTS["pool, and weights that see"])
    tokens, ids, mask = query_inputs(pool, 4, 6)
    with torch.inference_mode():
        fused = pool.fuse_query(tokens, ids, mask)
        mean = F.normalize(pool.text_projection(fused.fused_queries).mean(dim=1), dim=-1)
        both = torch.cat([fused.fused_queries, fused.fused_text], dim=1)
        valid = torch.cat([torch.ones(4, fused.fused_queries.shape[1], dtype=torch.int64), mask], dim=1)
        attention = (pool.base_pool.key(both) @ pool.base_pool.seeds[0]).masked_fill(valid == 0, -torch.inf).softmax(dim=1)  # (4, T)
        pooled = F.normalize((attention[:, None] @ both)[:, 0] @ pool.base_pool.projection[0], dim=-1)
        torch.testing.assert_close(fused.base_query, F.normalize(mean + pooled, dim=-1), rtol=0, atol=1e-5)
        cls = make_model(VARIANTS["cls"])
        fused = cls.fuse_query(tokens, ids, mask)
        first = F.normalize(cls.text_projection(fused.fused_text[:, 0]), dim=-1)
        torch.testing.assert_close(fused.base_query, first, rtol=0, atol=1e-6)
    assert not hasattr(cls, "base_pool")


def test_a_learned_temperature_starts_at_the_given_one_and_stays_in_bounds() -> None:
    model = make_model(msgspec.structs.replace(model_config(), learned_temperature=True))
    tau = model.temperature(0.07)
    assert isinstance(tau, torch.Tensor)
    assert tau.item() == pytest.approx(0.07)
    tau.backward()
    assert model.temperature_log_scale.grad is not None
    for scale, bound in ((-9.0, 0.01), (9.0, 0.5)):
        with torch.no_grad():
            model.temperature_log_scale.fill_(scale)
        model.bound_temperature(0.07)
        model.temperature_log_scale.grad = None
        tau = torch.as_tensor(model.temperature(0.07))
        tau.backward()
        assert tau.item() == pytest.approx(bound)
        assert model.temperature_log_scale.grad.item() == pytest.approx(bound)  # at the bound it can still come back
    assert make_model().temperature(0.07) == 0.07


def test_a_weight_is_at_most_its_gain() -> None:
    heads = make_model().attribute_heads
    with torch.inference_mode():
        weights = heads.weights(torch.tensor([[-50.0] * 4, [0.0] * 4, [50.0] * 4]))
        gain = F.softplus(heads.gain) / np.log(2)
    torch.testing.assert_close(weights, torch.stack([gain * 0, gain / 2, gain]), rtol=1e-5, atol=1e-6)


def test_padding_has_no_share_in_sub_queries_and_presence() -> None:
    heads = make_model().attribute_heads
    fused = torch.randn(2, 6, 16)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]])
    changed = torch.where(mask[:, :, None] == 0, 100.0, fused)
    with torch.inference_mode():
        torch.testing.assert_close(heads.sub_queries(fused, mask), heads.sub_queries(changed, mask))
        pooled = heads.pool(fused, mask)
        torch.testing.assert_close(heads.logits(fused, mask, pooled), heads.logits(changed, mask, pooled))


def upstream(model: DQEModel, embedded: torch.Tensor, image_tokens: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """transformers' own forward pass, which builds its own attention mask."""
    queries = model.query_tokens.shape[1]
    return model.qformer(
        query_embeds=embedded, query_length=queries, attention_mask=mask, encoder_hidden_states=image_tokens
    ).last_hidden_state


@pytest.mark.parametrize("name", ["plain", "deep"])
def test_fusion_is_transformers_forward_with_a_mask(name: str) -> None:
    model = make_model(VARIANTS[name])
    count = model.query_tokens.shape[1]
    tokens, ids, text_mask = query_inputs(model, 5, 7)
    queries = model.query_tokens.expand(5, -1, -1)
    mask = torch.cat([torch.ones(5, count, dtype=torch.int64), text_mask], dim=1)
    valid = mask.bool()
    with torch.inference_mode():
        embedded = model.embeddings(ids, query_embeds=queries)
        fused = upstream(model, embedded, tokens, mask)
        torch.testing.assert_close(model._fuse(embedded, tokens, text_mask)[valid], fused[valid], rtol=0, atol=1e-5)
        unmasked = upstream(model, embedded, tokens, torch.ones_like(mask))
        assert (unmasked[valid] - fused[valid]).abs().max() > 1e-3  # the mask matters
        base = F.normalize(model.text_projection(fused[:, :count]).mean(dim=1), dim=-1)
        torch.testing.assert_close(model.encode_query(tokens, ids, text_mask).base_query, base, rtol=0, atol=1e-5)
        targets = F.normalize(model.vision_projection(upstream(model, queries, tokens, None)), dim=-1)
        torch.testing.assert_close(model.encode_targets(tokens), targets, rtol=0, atol=1e-5)


def test_the_vocabulary_sizes_the_heads() -> None:
    one = AttributeVocabulary(attributes=(Attribute(name="colour", words=("red",)),))
    model = make_model(vocab=one)
    assert model.encode_query(*query_inputs(model, 2, 3)).sub_queries.shape == (2, 1, 8)
    assert model.sizes.attributes == 1


def test_seeds_reproduce() -> None:
    config = train_config()
    first, again = (build_model(config, vocabulary(), 50).state_dict() for _ in range(2))
    other = build_model(train_config(seed=1), vocabulary(), 50).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["query_tokens"], other["query_tokens"])
    assert all(torch.isfinite(p).all() for p in first.values())


def test_a_fresh_tower_tells_images_and_places_apart() -> None:
    """Upstream's default initialisation is 1e-10: all images alike. Ours is not, and a moved object gives other tokens."""
    model = make_model()
    left, right = torch.zeros(2, 3, 16, 16).unbind()
    left[:, 4:8, :4], right[:, 4:8, 12:] = 2.0, 2.0
    with torch.inference_mode():
        tokens = model.encode_images(torch.stack([left, right, torch.zeros(3, 16, 16)]))
    pooled = tokens.mean(dim=1)
    assert (pooled[0] - pooled[2]).abs().max() > 1e-3
    assert (pooled[0] - pooled[1]).abs().max() > 1e-3


# -- pretrained towers ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tower(garments: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tower") / "vision"
    figures = pretrain_from_dataset(garments, out, model_config(), PretrainConfig(epochs=2, batch_size=16))
    assert set(figures) == {"colour", "shape", "pattern", "length"}
    assert all(0 <= value <= 1 for value in figures.values())
    return out


def test_a_pretrained_tower_is_loaded(tower: Path) -> None:
    config = msgspec.structs.replace(train_config(), vision_weights=str(tower))
    model, fresh = build_model(config, vocabulary(), 50), build_model(train_config(), vocabulary(), 50)
    name = "embeddings.patch_embedding.weight"
    assert not torch.equal(model.vision_model.state_dict()[name], fresh.vision_model.state_dict()[name])
    assert {path.name for path in tower.iterdir()} == {"vision.safetensors", "vision.json"}


def test_a_tower_of_another_size_is_refused(tower: Path) -> None:
    model = make_model(model_config(hidden_size=32))  # the Q-Former may differ …
    load_vision(model, str(tower))
    other = make_model(VARIANTS["plain"].__class__(preprocessing=VARIANTS["plain"].preprocessing))  # … the tower may not
    with pytest.raises(CheckpointError, match="the configuration wants"):
        load_vision(other, str(tower))


@pytest.mark.parametrize("damage", ["weights", "record", "record key", "missing"])
def test_a_damaged_tower_is_one_line(tower: Path, tmp_path: Path, damage: str) -> None:
    copy = tmp_path / "tower"
    copy.mkdir()
    weights, record = (tower / name for name in ("vision.safetensors", "vision.json"))
    (copy / weights.name).write_bytes(weights.read_bytes()[: 100 if damage == "weights" else None])
    if damage != "missing":
        text = record.read_text()
        (copy / record.name).write_text({"record": text[:50], "record key": "{}"}.get(damage, text))
    with pytest.raises(CheckpointError) as caught:
        load_vision(make_model(), str(copy))
    assert str(copy) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_pretraining_with_fewer_images_than_a_batch_still_trains(garments: Path, tmp_path: Path) -> None:
    events: list[dict[str, float]] = []
    pretrain_from_dataset(garments, tmp_path / "out", model_config(), PretrainConfig(epochs=1, batch_size=512), listener=events.append)
    assert [e["step"] for e in events if e["event"] == "step"] == [1]
