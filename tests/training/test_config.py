"""Configuration: presets, YAML and overrides; every mistake is one line that names it."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import pytest
from support.tiny_blip2 import IMAGE_SIZE, write_blip2
from support.tiny_training import write_checkpoint

from dqe_engine.contracts.parsing import parse_json, to_json
from dqe_engine.errors import InputError
from dqe_training.config import TrainConfig, preset_names
from dqe_training.run.configuration import load_config

OF_A_BACKBONE = ("blip2", "fashioniq", "cirr")
"""Presets whose model is their backbone's."""


@pytest.mark.parametrize("name", preset_names())
def test_presets_parse_and_survive_json(name: str, tmp_path: Path) -> None:
    if name in OF_A_BACKBONE:
        write_blip2(tmp_path)
    if name == "start":
        write_checkpoint(tmp_path / "model")
    named = {"start": [f"start={tmp_path / 'model'}"]} | {preset: [f"backbone={tmp_path}"] for preset in OF_A_BACKBONE}
    config = load_config(name, named.get(name, []))
    assert parse_json(TrainConfig, to_json(config), where="") == config


@pytest.mark.parametrize(("name", "rate", "epochs", "refreshes"), [("fashioniq", 5e-6, 30, 5), ("cirr", 1e-5, 50, 6)])
def test_presets_of_public_datasets(name: str, rate: float, epochs: int, refreshes: int, tmp_path: Path) -> None:
    """QuRe's settings: about a sixth of the epochs without mined negatives, and a new set at every sixth."""
    write_blip2(tmp_path)
    config = load_config(name, [f"backbone={tmp_path}"])
    optim, trns, spec = config.optim, config.trns, config.model.preprocessing
    assert (optim.learning_rate, optim.epochs, optim.batch_size, optim.weight_decay) == (rate, epochs, 32, 0.05)
    assert trns.warmup_epochs == trns.interval == epochs // 6
    assert len(range(trns.warmup_epochs, epochs, trns.interval)) == refreshes
    assert (spec.fit, spec.target_ratio, spec.background) == ("target_pad_crop", 1.25, (0, 0, 0))
    assert spec.image_size == IMAGE_SIZE, "the backbone's, which its position embeddings fix"
    # What docs/backbones.md says fills a feature cache for it.
    same = load_config(
        "blip2", [f"backbone={tmp_path}", "model.preprocessing.fit=target_pad_crop", "model.preprocessing.background=[0,0,0]"]
    )
    assert same.model.preprocessing == spec
    other = load_config(name, [f"backbone={tmp_path}", "model.preprocessing.fit=stretch"])
    assert other.model.preprocessing.fit == "stretch"


def test_every_setting_of_a_public_datasets_preset_names_its_source() -> None:
    for name in ("fashioniq", "cirr"):
        text = files("dqe_training.presets").joinpath(f"{name}.yaml").read_text()
        settings = [line for line in text.splitlines() if line and not line.startswith("#") and not line.endswith(":")]
        assert len(settings) > 10
        for line in settings:
            assert any(source in line.partition(" # ")[2] for source in ("QuRe", "CLIP4Cir", "ours")), line


def test_the_garments_preset_ships() -> None:
    assert "garments" in preset_names()


def test_overrides_change_single_values() -> None:
    config = load_config(
        "garments",
        ["optim.epochs=7", "optim.learning_rate=1e-3", "optim.autocast=off", "model.qformer.pooled=true", "loss.objective=infonce",
         "trns.zones.lo=0", "vision_weights=", "optim.weight_decay=.5", "loss.rank_weight=2"],
    )  # fmt: skip
    assert (config.optim.epochs, config.optim.learning_rate, config.optim.autocast) == (7, 1e-3, "off")
    assert config.model.qformer.pooled is True
    assert (config.loss.objective, config.loss.rank_weight, config.trns.zones.lo) == ("infonce", 2, 0)
    assert (config.vision_weights, config.optim.weight_decay) == ("", 0.5)
    assert config.optim.batch_size == load_config("garments").optim.batch_size


def test_a_yaml_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("model: {preprocessing: {image_size: 32}}\noptim:\n  learning_rate: 3e-4\n  autocast: off\n  seed: 0x10\n")
    config = load_config(str(path), ["optim.epochs=2"])
    assert (config.optim.learning_rate, config.optim.autocast, config.optim.seed, config.optim.epochs) == (3e-4, "off", 16, 2)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optim.epoch=3", "unknown field `epoch` - at `$.optim`; valid keys of OptimConfig: epochs, steps, seconds, batch_size"),
        ("optimiser.epochs=3", "unknown field `optimiser`; valid keys of TrainConfig: model, loss, trns, optim, vision_weights"),
        ("model.qformer.depth=3", "unknown field `depth` - at `$.model.qformer`; valid keys of QFormerConfig: hidden_size"),
        ("trns.zones.low=3", "valid keys of ZoneSpec: lo, hi"),
        ("optim.epochs=many", "`int`, got `str`"),
        ("optim.epochs=1.5", "`int`"),
        ("optim.learning_rate=fast", "`float`"),
        ("model.qformer.pooled=maybe", "`bool`"),
        ("loss.objective=triplet", "'triplet' - at `$.loss.objective`; valid values: kl, infonce"),
        (
            "trns.zones.bounds=quantile",
            "valid values: absolute, pooled, rank; it is called 'rank' now and does not depend on the target; take 'pooled'",
        ),
        ("optim=3", "object"),
        ("optim.epochs", "expected section.key=value"),
        ("=3", "expected section.key=value"),
        ("vision_weights.path=x", "'vision_weights' is a value, not a section"),
        ("optim.epochs=[1", "not valid YAML"),
        ("optim.epochs=", "`int`"),
        ("optim.batch_size=1", "at least 2"),
        ("optim.epochs=0", "nothing to train"),
        ("optim.steps=-1", "steps must be at least 0"),
        ("optim.log_every=0", "log_every must be at least 1"),
        ("optim.checkpoint_every=-1", "checkpoint_every must be at least 1"),
        ("trns.interval=0", "interval must be at least 1"),
        ("trns.zones.lo=0.5", "lo <= hi"),
        ("model.qformer.heads=7", "hidden_size must be a multiple of heads"),
        ("model.vision.layers=0", "layers must be at least 1"),
        ("model.vision.patch_size=999", "holds no patch"),
        ("model.qformer.max_text_length=2", "max_text_length must be at least 3"),
        ("loss.temperature=0", "temperature must be at least"),
        ("loss.temperature=.nan", "temperature must be at least"),
        ("loss.relevance_share=0.5", "relevance_share must lie in"),
        ("model.preprocessing.image_size=0", "image_size must be at least 1"),
    ],
)
def test_a_bad_override_is_one_line(override: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        load_config("garments", [override])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_training_ends_in_one_way() -> None:
    with pytest.raises(InputError, match="after steps or after seconds, got 5 and 2"):
        load_config("garments", ["optim.steps=5", "optim.seconds=2"])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "expected a mapping"),
        (b"- 1\n- 2\n", "expected a mapping of sections, got list"),
        (b"model: [", "not valid YAML"),
        (b"optim: {epochs: 3}\n", "model"),
        (b"model: {preprocessing: {image_size: 32, crop: 1}}", "valid keys of PreprocessingSpec: image_size"),
        (b"\xff\xfe\x00", "UTF-8"),
        (b"model: !!python/object/apply:os.system ['true']", "not valid YAML"),
        (b"1: 2\nmodel: {preprocessing: {image_size: 32}}", "`str`"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"bad\.yaml") as caught:
        load_config(str(path))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_preset_lists_those_that_ship() -> None:
    with pytest.raises(InputError, match=r"'shoes': no such preset; presets are .*garments"):
        load_config("shoes")
    with pytest.raises(InputError, match="no such configuration file"):
        load_config("shoes.yaml")
