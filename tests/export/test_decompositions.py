"""A program is traced once where its operators can be rewritten by hand, and by PyTorch's own decompositions where not."""

from __future__ import annotations

from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from dqe_export.decompositions import decomposed_by_hand
from dqe_export.onnx_graph import OPSET


class Simple(nn.Module):
    """All that our graphs hold and ONNX lacks: casts to the same and another type, `1 - x`, and writing to a tensor of one's own."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = x * 2
        y += x.float()
        return (1.0 - (x > 0).to(x.dtype)) * y, y.float()


class WritesToWhatIsRead(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = x * 2
        z = y[:, 1:]
        y += 1
        return y, z


class WritesThroughAView(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = x * 2
        y[:, 1:].add_(1)
        return y, y + x


class NeedsATable(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.addcdiv(x, x, x * x + 1), torch.special.xlog1py(x, x.abs())


@pytest.mark.parametrize(("module", "traced_again"), [(Simple, 0), (WritesToWhatIsRead, 1), (WritesThroughAView, 1), (NeedsATable, 1)])
def test_a_graph_is_what_pytorch_computes(module: type[nn.Module], traced_again: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = ExportedProgram.run_decompositions

    def counted(program: ExportedProgram, *arguments: Any, **options: Any) -> ExportedProgram:
        calls.append(program)
        return original(program, *arguments, **options)

    monkeypatch.setattr(ExportedProgram, "run_decompositions", counted)
    batch = torch.export.Dim("batch", min=1)
    with decomposed_by_hand():
        program = torch.onnx.export(
            module().eval(), (torch.randn(3, 4),), dynamo=True, opset_version=OPSET, dynamic_shapes=({0: batch},), verbose=False
        )
    assert ExportedProgram.run_decompositions is counted
    assert len(calls) == traced_again
    assert program is not None
    onnx.checker.check_model(program.model_proto)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    for rows in (1, 7):
        x = torch.randn(rows, 4)
        found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        for ours, expected in zip(found, module()(x.clone()), strict=True):
            torch.testing.assert_close(torch.from_numpy(ours), expected, rtol=0, atol=1e-6)


def test_what_failed_leaves_no_trace() -> None:
    before = ExportedProgram.run_decompositions
    with pytest.raises(ZeroDivisionError), decomposed_by_hand():
        raise ZeroDivisionError
    assert ExportedProgram.run_decompositions is before
