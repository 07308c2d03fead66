"""Exports that replay graphs traced before: tracing takes most of an export's time and touches no file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import torch
from onnx import helper, numpy_helper

from dqe_engine.contracts.graphs import GRAPHS

Edit = Callable[[str, onnx.ModelProto], None]


def replay(bundle: Path, edit: Edit = lambda name, proto: None) -> Callable[..., Any]:
    """A stand-in for `torch.onnx.export` that gives the graphs of `bundle`, each after `edit(its name, it)`."""

    def export(module: torch.nn.Module, *, output_names: list[str], **options: Any) -> SimpleNamespace:
        (spec,) = (spec for spec in GRAPHS if [t.name for t in spec.outputs] == output_names)
        proto = onnx.load(bundle / spec.file)
        edit(spec.name, proto)
        return SimpleNamespace(model_proto=proto)

    return export


def change_weight(proto: onnx.ModelProto, name: str, change: Callable[[Any], Any]) -> None:
    """Replace the initializer `name` by `change` of its array."""
    (position,) = (i for i, tensor in enumerate(proto.graph.initializer) if tensor.name == name)
    changed = change(numpy_helper.to_array(proto.graph.initializer[position]).copy())
    proto.graph.initializer[position].CopyFrom(numpy_helper.from_array(changed, name))


def drop_mask(proto: onnx.ModelProto) -> None:
    """Make the graph attend to padding: `attention_mask` becomes all ones."""
    for node in proto.graph.node:
        for i, name in enumerate(node.input):
            if name == "attention_mask":
                node.input[i] = "all_ones"
    zero, one = (numpy_helper.from_array(torch.tensor([value]).numpy(), f"constant_{value}") for value in (0, 1))
    proto.graph.initializer.extend([zero, one])
    nodes = [helper.make_node("Mul", ["attention_mask", zero.name], ["zeros"]), helper.make_node("Add", ["zeros", one.name], ["all_ones"])]
    for node in reversed(nodes):
        proto.graph.node.insert(0, node)
