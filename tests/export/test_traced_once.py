"""The memory that spares the other export tests most of their tracing: it is never taken for another graph."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from onnx import helper
from support.tiny_training import make_model, model_config
from support.traced_once import trace_key, traced_once

from dqe_engine.contracts.graphs import QUERY_ENCODER
from dqe_export.graphs import dynamic_shapes, graph_module, random_inputs
from dqe_training.model.cross_attention import upstream_attention

Inputs = dict[str, torch.Tensor]


@pytest.fixture
def asked() -> tuple[torch.nn.Module, Inputs, dict[str, Any]]:
    model = make_model(model_config())
    inputs = random_inputs(QUERY_ENCODER, model.sizes, 200, batch=3, text_length=6, seed=0)
    return graph_module(QUERY_ENCODER, model), inputs, {"opset_version": 20, "dynamic_shapes": dynamic_shapes(QUERY_ENCODER, 16)}


def a_weight(module: torch.nn.Module, inputs: Inputs, options: dict[str, Any]) -> None:
    with torch.no_grad():
        list(module.parameters())[-1].view(-1)[-1] += 1e-6


def a_setting(module: torch.nn.Module, inputs: Inputs, options: dict[str, Any]) -> None:
    next(part for part in module.modules() if isinstance(part, torch.nn.LayerNorm)).eps *= 2


def a_layer_in_another_mode(module: torch.nn.Module, inputs: Inputs, options: dict[str, Any]) -> None:
    next(part for part in module.modules() if isinstance(part, torch.nn.Dropout)).training = True


def another_attention(module: torch.nn.Module, inputs: Inputs, options: dict[str, Any]) -> None:
    module.model.qformer.set_attn_implementation("eager" if module.model.qformer.config._attn_implementation == "sdpa" else "sdpa")


def other_inputs(module: torch.nn.Module, inputs: Inputs, options: dict[str, Any]) -> None:
    inputs["input_ids"] = inputs["input_ids"][:2]


def other_options(module: torch.nn.Module, inputs: Inputs, options: dict[str, Any]) -> None:
    options["opset_version"] = 21


def other_axes(module: torch.nn.Module, inputs: Inputs, options: dict[str, Any]) -> None:
    options["dynamic_shapes"] = dynamic_shapes(QUERY_ENCODER, 17)


def a_hook(module: torch.nn.Module, inputs: Inputs, options: dict[str, Any]) -> None:
    next(module.children()).register_forward_hook(lambda *_: None)


CHANGES = (a_weight, a_setting, a_layer_in_another_mode, another_attention, other_inputs, other_options, other_axes, a_hook)


@pytest.mark.parametrize("change", CHANGES)
def test_another_graph_has_another_key(asked: Any, change: Callable[..., None]) -> None:
    module, inputs, options = asked
    before = trace_key(module, inputs, options)
    assert trace_key(module, inputs, options) == before
    change(module, inputs, options)
    assert trace_key(module, inputs, options) != before


def test_the_other_cross_attention_has_another_key(asked: Any) -> None:
    module, before = asked[0], trace_key(*asked)
    with upstream_attention(module.model.qformer):
        assert trace_key(*asked) != before
    assert trace_key(*asked) == before


def test_other_code_has_another_key(asked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = trace_key(*asked)
    monkeypatch.setattr(type(asked[0]), "forward", lambda self, **inputs: inputs)
    assert trace_key(*asked) != before


def test_the_order_of_a_set_changes_no_key(asked: Any) -> None:
    """It is another in each process, and workers and later runs share what is traced."""
    keys = set()
    for names in ({0, 8}, {8, 0}, {0, 9}):
        asked[0].names = {"of layers": names}
        keys.add(trace_key(*asked))
    assert repr({0, 8}) != repr({8, 0})
    assert len(keys) == 2


def test_equal_modules_are_traced_once(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    traced: list[torch.nn.Module] = []

    def trace(module: torch.nn.Module, **_: Any) -> SimpleNamespace:
        traced.append(module)
        value = helper.make_tensor_value_info("x", 1, [len(traced)])
        return SimpleNamespace(model_proto=helper.make_model(helper.make_graph([], "g", [value], [value])))

    monkeypatch.setattr(torch.onnx, "export", trace)
    monkeypatch.setenv("DQE_TESTS_KEEP", "0")  # what is traced here is no graph that a later run should find
    torch.manual_seed(7)
    first, other = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    same = torch.nn.Linear(2, 3)
    same.load_state_dict(first.state_dict())
    with traced_once(tmp_path_factory), traced_once(tmp_path_factory):
        one, two, three = (torch.onnx.export(module, kwargs={}, opset_version=20).model_proto for module in (first, same, other))
    assert traced == [first, other]
    assert one == two != three
    assert torch.onnx.export is trace
