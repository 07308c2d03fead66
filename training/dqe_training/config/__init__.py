"""Training configuration in frozen, typed sections; `run.configuration` reads a preset or a YAML file into them."""

from .reading import override, preset_names
from .schema import (
    Activation,
    BaseQuery,
    LoRAConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    QFormerConfig,
    TrainConfig,
    TRNSConfig,
    VisionConfig,
    WeightInputs,
)

__all__ = [
    "Activation",
    "BaseQuery",
    "LoRAConfig",
    "LossConfig",
    "ModelConfig",
    "OptimConfig",
    "QFormerConfig",
    "TRNSConfig",
    "TrainConfig",
    "VisionConfig",
    "WeightInputs",
    "override",
    "preset_names",
]
