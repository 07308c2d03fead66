"""What a BLIP-2 checkpoint's `config.json` and preprocessor configuration say, as a `ModelConfig`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import msgspec

from dqe_engine.contracts.parsing import NOT_JSON, without_mark
from dqe_engine.contracts.preprocessing import PreprocessingSpec
from dqe_engine.errors import CheckpointError

from ..config.schema import Activation, ModelConfig, QFormerConfig, VisionConfig

ARCHITECTURE = "Blip2ForImageTextRetrieval"
_RESAMPLE = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers


class UpstreamVision(msgspec.Struct, frozen=True):
    """`vision_config`. Upstream writes only what differs from its defaults, which are these."""

    hidden_size: int = 1408
    intermediate_size: int = 6144
    num_hidden_layers: int = 39
    num_attention_heads: int = 16
    image_size: int | list[int] = 224
    patch_size: int | list[int] = 14
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    qkv_bias: bool = True


class UpstreamQFormer(msgspec.Struct, frozen=True):
    """`qformer_config`, with upstream's defaults."""

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    cross_attention_frequency: int = 2
    use_qformer_text_input: bool = False


class UpstreamConfig(msgspec.Struct, frozen=True):
    """`config.json`, with upstream's defaults. The language model's section is no part of the image-text model."""

    architectures: list[str] | None = None
    vision_config: UpstreamVision = UpstreamVision()
    qformer_config: UpstreamQFormer = UpstreamQFormer()
    num_query_tokens: int = 32
    image_text_hidden_size: int = 256


class UpstreamPreprocessor(msgspec.Struct, frozen=True):
    """The image processor's configuration: `preprocessor_config.json`, or a section of `processor_config.json`."""

    size: dict[str, int] | int
    image_mean: list[float]
    image_std: list[float]
    resample: int = 3
    rescale_factor: float = 1 / 255
    do_resize: bool = True
    do_rescale: bool = True
    do_normalize: bool = True
    do_center_crop: bool | None = None


def describe_backbone(directory: Path) -> ModelConfig:
    """The model that a checkpoint directory holds, sizes and preprocessing taken over exactly.

    `max_text_length` is the whole position table; `dropout` is the checkpoint's. Raises CheckpointError naming the file
    and key for what is missing or what this package's model cannot be.
    """
    path = directory / "config.json"
    upstream = _read(path, UpstreamConfig, _json(path))
    vision, q = upstream.vision_config, upstream.qformer_config
    if upstream.architectures and ARCHITECTURE not in upstream.architectures:
        raise CheckpointError(f"{path}: holds {', '.join(upstream.architectures)}, expected {ARCHITECTURE}; take an image-text checkpoint")
    if not q.use_qformer_text_input:
        raise CheckpointError(
            f"{path}: qformer_config.use_qformer_text_input is false, so its Q-Former reads no text; take an {ARCHITECTURE}"
        )
    if q.hidden_dropout_prob != q.attention_probs_dropout_prob:
        raise CheckpointError(
            f"{path}: qformer_config has dropouts {q.hidden_dropout_prob} and {q.attention_probs_dropout_prob}, but the model has one; "
            "make them equal"
        )
    image_size = _side(vision.image_size, path, "vision_config.image_size")
    try:
        return ModelConfig(
            preprocessing=_preprocessing(directory, image_size),
            vision=VisionConfig(
                hidden_size=vision.hidden_size,
                layers=vision.num_hidden_layers,
                heads=vision.num_attention_heads,
                mlp_size=vision.intermediate_size,
                patch_size=_side(vision.patch_size, path, "vision_config.patch_size"),
                layer_norm_eps=vision.layer_norm_eps,
                activation=_activation(vision.hidden_act, path, "vision_config.hidden_act"),
                qkv_bias=vision.qkv_bias,
            ),
            qformer=QFormerConfig(
                hidden_size=q.hidden_size,
                layers=q.num_hidden_layers,
                heads=q.num_attention_heads,
                mlp_size=q.intermediate_size,
                query_tokens=upstream.num_query_tokens,
                embedding_dim=upstream.image_text_hidden_size,
                cross_attention_frequency=q.cross_attention_frequency,
                max_text_length=q.max_position_embeddings,
                dropout=q.hidden_dropout_prob,
                layer_norm_eps=q.layer_norm_eps,
                activation=_activation(q.hidden_act, path, "qformer_config.hidden_act"),
                vocab_size=q.vocab_size,
                position_embeddings=q.max_position_embeddings,
            ),
        )
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _json(path: Path) -> Any:
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; a BLIP-2 checkpoint has it, copy the whole repository")
    try:
        return msgspec.json.decode(without_mark(path.read_bytes()))
    except NOT_JSON as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}); copy it again") from error


def _read(path: Path, kind: type[Any], data: Any) -> Any:
    """`data` as `kind`; keys that `kind` does not have are upstream's business."""
    try:
        return msgspec.convert(data, kind)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _side(value: int | list[int], path: Path, key: str) -> int:
    sides = {value} if isinstance(value, int) else set(value)
    if len(sides) != 1:
        raise CheckpointError(f"{path}: {key} is {value}; only squares are supported")
    return sides.pop()


def _activation(name: str, path: Path, key: str) -> Any:
    if name not in get_args(Activation):
        raise CheckpointError(f"{path}: {key} is {name!r}; {' and '.join(get_args(Activation))} are supported")
    return name


def _preprocessing(directory: Path, image_size: int) -> PreprocessingSpec:
    path = directory / "preprocessor_config.json"
    if path.is_file() or not (directory / "processor_config.json").is_file():
        data = _json(path)
    else:
        path = directory / "processor_config.json"
        data = _json(path)
        data = data.get("image_processor") if isinstance(data, dict) else None
    p = _read(path, UpstreamPreprocessor, data)
    if p.size not in (image_size, {"height": image_size, "width": image_size}):
        raise CheckpointError(f"{path}: size is {p.size}, but the vision tower of config.json takes squares of {image_size} px")
    if not (p.do_resize and p.do_rescale and p.do_normalize) or p.do_center_crop or abs(p.rescale_factor * 255 - 1) > 1e-6:
        raise CheckpointError(f"{path}: expected images that are resized to a square, scaled by 1/255 and normalised, without a crop")
    if p.resample not in _RESAMPLE:
        raise CheckpointError(f"{path}: resample is {p.resample}; bilinear (2) and bicubic (3) are supported")
    if not len(p.image_mean) == len(p.image_std) == 3:
        raise CheckpointError(f"{path}: image_mean and image_std must have three values, one per RGB channel")
    return msgspec.convert(
        {"image_size": image_size, "resample": _RESAMPLE[p.resample], "mean": p.image_mean, "std": p.image_std}, PreprocessingSpec
    )
