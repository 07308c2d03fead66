"""Which parameters train, and low-rank adapters (LoRA, by peft) of the Q-Former that no saved weights show.

Checkpoints hold merged weights under the names of a model without adapters; what resuming needs beside them is kept apart.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dqe_engine.errors import InputError

from ..config import LoRAConfig, TrainConfig
from .dqe import DQEModel

_NAME = "default"  # peft's name for the only adapter
_STATE = "adapter."
_HEADS = "attribute_heads."
_PROJECTIONS = ("vision_projection.", "text_projection.", "base_pool.", "temperature_log_scale")


def prepare_finetuning(model: DQEModel, config: TrainConfig) -> None:
    """Add adapters where `finetune` is "lora", and let require gradients what the configuration trains.

    Raises InputError when `lora.targets` names no linear layer of the Q-Former.
    """
    if config.finetune == "lora" and not has_adapters(model):
        _add_adapters(model.qformer, config.lora)
        if config.model.base_query == "two_encoders":
            _add_adapters(model.second_qformer, config.lora)
    for name, parameter in model.named_parameters():
        if name.startswith("vision_model."):
            parameter.requires_grad_(config.optim.vision_learning_rate > 0)
        elif config.encoder_frozen:
            parameter.requires_grad_(name.startswith(_HEADS))
        elif config.finetune == "full" or name.startswith((_HEADS, *_PROJECTIONS)):
            parameter.requires_grad_(True)
        else:
            parameter.requires_grad_(".lora_" in name)


def _add_adapters(qformer: nn.Module, config: LoRAConfig) -> None:
    """peft draws the first matrix at random (the seed is the caller's) and starts the second at zero: no change at first."""
    from peft import LoraConfig, inject_adapter_in_model

    suffixes = tuple(f".{target}" for target in config.targets)
    targets = [name for name, module in qformer.named_modules() if isinstance(module, nn.Linear) and name.endswith(suffixes)]
    if not targets:
        names = sorted({name.rpartition(".")[2] for name, module in qformer.named_modules() if isinstance(module, nn.Linear)})
        raise InputError(f"lora.targets {', '.join(config.targets)}: no such linear layer in the Q-Former; it has {', '.join(names)}")
    inject_adapter_in_model(
        LoraConfig(r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=targets), qformer
    )


def _adapted(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if hasattr(module, "get_delta_weight")}


def has_adapters(model: nn.Module) -> bool:
    return bool(_adapted(model))


@torch.no_grad()
def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """`state_dict()` as of a model without adapters: theirs are added to the weights that they adapt."""
    adapted = _adapted(model)
    state = {}
    for key, value in model.state_dict().items():
        layer, _, rest = key.partition(".base_layer.")
        if rest == "weight":
            state[f"{layer}.weight"] = value + adapted[layer].get_delta_weight(_NAME).to(value.dtype)  # type: ignore[operator]
        elif rest:
            state[f"{layer}.{rest}"] = value
        elif ".lora_" not in key:
            state[key] = value
    return state


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """What `plain_state` cannot give back to the bit: adapters, and the weights that they adapt. Empty without any."""
    return {_STATE + key: value for key, value in model.state_dict().items() if ".lora_" in key or ".base_layer." in key}


def restore(model: nn.Module, plain: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    """The inverse of `plain_state` and `adapter_state`, for a model that is prepared as theirs was."""
    own = model.state_dict()
    adapted = {key.removeprefix(_STATE): value for key, value in state.items() if key.startswith(_STATE)}
    model.load_state_dict({key: adapted[key] if key in adapted else plain[key] for key in own})


def merge_adapters(model: nn.Module) -> None:
    """Put plain linear layers with the merged weights in the place of adapted ones. Does nothing where there are none."""
    merged = plain_state(model)
    for name, module in _adapted(model).items():
        base = module.base_layer
        assert isinstance(base, nn.Linear)
        with torch.no_grad():
            base.weight.copy_(merged[f"{name}.weight"])
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, base)
