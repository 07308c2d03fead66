"""A configuration, with the model of the checkpoint or backbone that it names."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from dqe_engine.contracts.parsing import parse
from dqe_engine.errors import InputError

from ..backbone import describe_backbone, find_backbone
from ..checkpointing.start import check_start, read_start
from ..config.reading import named_in, override, read_source, with_defaults
from ..config.schema import ModelConfig, TrainConfig


def load_config(source: str, overrides: Sequence[str] = ()) -> TrainConfig:
    """Parse a preset name or YAML path with overrides. Raises InputError naming the key and the valid ones.

    Where a `backbone` is named, `model` starts from its configuration: it is fetched here if it is not on this machine,
    and CheckpointError is raised when that fails or when its configuration is not one that a model can have. So it does where
    a `start` is named, and CheckpointError is raised when there is no checkpoint, or when its weights do not fit what is set over it.
    """
    data = read_source(source)
    if not isinstance(data, dict):
        raise InputError(f"{source}: expected a mapping of sections, got {type(data).__name__}")
    described: ModelConfig | None = None
    if start := named_in("start", data, overrides):
        described = read_start(start).config.model
        if named_in("finetune", data, overrides) == "attributes":  # which may be the first that this encoder gets
            described = msgspec.structs.replace(described, attribute_weights=True)
    elif backbone := named_in("backbone", data, overrides):
        described = describe_backbone(find_backbone(backbone))
    if described is not None:
        data = data | {"model": with_defaults(data.get("model", {}), msgspec.to_builtins(described))}
    elif "model" not in data:
        raise InputError(
            f"{source}: no model section; add one, or name a checkpoint: backbone=owner/name or backbone=DIRECTORY of BLIP-2, "
            "or start=RUN/model of dqe-train"
        )
    config = override(parse(TrainConfig, data, where=source), overrides, where=source)
    if start and described is not None:
        check_start(config, described)
    return config
