"""Training configuration: a preset or YAML file plus `section.key=value` overrides, resolved to frozen, typed sections.

`resolving` reads what a checkpoint (`start`) or a backbone says of its model, and both say it in the terms of `schema`. So importing
this package does not import `resolving`: `load_config` is looked up there when it is first asked for.
"""

from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from .resolving import load_config

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
    "load_config",
    "override",
    "preset_names",
]


def __getattr__(name: str) -> Any:
    if name != "load_config":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .resolving import load_config

    return load_config
