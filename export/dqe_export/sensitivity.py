"""Which layers int8 hurts: each linear layer of a graph rounded alone, in PyTorch, and what that does to the outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

from dqe_engine.contracts.parsing import Contract

from .precision import Int8
from .row_int8 import ACTIVATION_STEPS, WEIGHT_STEPS


class LayerSensitivity(Contract, frozen=True):
    """Smallest cosine of any output vector with float32's, where this layer alone is rounded. `kept`: in float32 in the bundle."""

    graph: str
    layer: str
    cosine: float
    kept: bool = False


@torch.inference_mode()
def sweep(
    graph: str,
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    precision: Int8 = "int8",
    *,
    advance: Callable[[str], None] = lambda layer: None,
) -> list[LayerSensitivity]:
    """Round the linear layers of `module` one at a time as `precision` does; the most sensitive first."""
    rounded = _rounded_rows if precision == "int8" else _rounded_tensor
    layers, used = _linear_layers(module), set[nn.Module]()
    handles = [layer.register_forward_hook(lambda layer, *_: used.add(layer)) for layer in layers.values()]
    expected = _outputs(module, inputs)
    for handle in handles:
        handle.remove()
    found = []
    for name, layer in layers.items():
        if layer not in used:  # another graph's
            continue
        advance(name)
        handle = layer.register_forward_hook(rounded)
        try:
            changed = _outputs(module, inputs)
        finally:
            handle.remove()
        cosine = min(_least_cosine(a, b) for a, b in zip(expected, changed, strict=True))
        found.append(LayerSensitivity(graph=graph, layer=name, cosine=min(cosine, 1.0)))
    return sorted(found, key=lambda s: (s.cosine, s.layer))


def _least_cosine(a: Tensor, b: Tensor) -> float:
    """Over the vectors of the last axis; 1 for equal ones, also of zeros, which have none."""
    return torch.where((a == b).all(dim=-1), 1.0, F.cosine_similarity(a, b, dim=-1)).min().item()


def _linear_layers(module: nn.Module) -> dict[str, nn.Linear]:
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}


def _outputs(module: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    output = module(**inputs)
    return output if isinstance(output, tuple) else (output,)


def _rounded_rows(layer: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """The layer's output by the scheme of `row_int8`."""
    return _product(layer, arguments[0], arguments[0].abs().amax(dim=-1, keepdim=True), WEIGHT_STEPS)


def _rounded_tensor(layer: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """The layer's output with one scale for all activations, and 8 bits of the weights."""
    return _product(layer, arguments[0], arguments[0].abs().amax(), 127)


def _product(layer: nn.Module, x: Tensor, largest: Tensor, weight_steps: int) -> Tensor:
    assert isinstance(layer, nn.Linear)
    step = (largest / ACTIVATION_STEPS).clamp_min(1e-30)
    scale = (layer.weight.abs().amax(dim=1, keepdim=True) / weight_steps).clamp_min(1e-30)
    return F.linear((x / step).round() * step, (layer.weight / scale).round() * scale, layer.bias)


def nodes_of(path: Path, module: nn.Module, layers: Sequence[str]) -> list[str]:
    """Names of the nodes of the float32 graph `path` that multiply by the weights of `layers`, found by the weights' values."""
    if not layers:
        return []
    linear = _linear_layers(module)
    wanted = [linear[name].weight.detach().numpy() for name in layers]
    graph = onnx.load(path).graph
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer if len(tensor.dims) == 2}
    names = {
        name for name, array in weights.items() for weight in wanted
        if any(array.shape == w.shape and (array == w).all() for w in (weight, weight.T))
    }  # fmt: skip
    return [node.name for node in graph.node if node.op_type == "MatMul" and names.intersection(node.input)]
