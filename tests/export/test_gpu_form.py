"""Graphs for GPUs: attention in the one form that TensorRT fuses, in every precision, and as close to PyTorch as those for CPUs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from support.tiny_training import make_model, model_config, write_checkpoint
from torch import Tensor

from dqe_engine.bundle import Bundle
from dqe_engine.contracts.graphs import ATTRIBUTE_HEADS, GRAPHS, QUERY_ENCODER, TARGET_ENCODER, VISION_ENCODER, GraphSpec
from dqe_engine.contracts.manifest import Precision
from dqe_engine.contracts.parsing import parse_json
from dqe_engine.errors import InputError
from dqe_engine.heads import replace_heads
from dqe_export import bundle as bundle_module
from dqe_export.attention_blocks import attention_blocks
from dqe_export.bundle import ExportOptions
from dqe_export.cli.export import _export, build_parser, main
from dqe_export.graphs import graph_module
from dqe_export.parity import TOLERANCES, Reference
from dqe_export.report import ExportReport
from dqe_training.config import VisionConfig
from dqe_training.model import gpu_attention as gpu_module
from dqe_training.model.gpu_attention import gpu_attention

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = msgspec.structs.replace(
    model_config(hidden_size=128, layers=2, base_query="pool", max_text_length=20),
    vision=VisionConfig(hidden_size=64, layers=2, heads=2, patch_size=8),
)

SELF, CROSS = ("text", 64, "text", "masked"), (3, 64, 5, "")
ATTENTION: dict[str, list[tuple[int | str, int, int | str, str]]] = {
    "vision_encoder": [(5, 32, 5, ""), (5, 32, 5, "")],
    "query_encoder": [SELF, CROSS, SELF, CROSS],
    "target_encoder": [CROSS, (3, 64, 3, ""), CROSS],  # the first layer's over the queries is computed at export
    "attribute_heads": [],
}
"""Queries, width of a head, keys, and whether there is a mask, of each attention in order. "text": as many as there are."""
HEADS = 2
_TOKENS = {"Add", "Gelu", "LayerNormalization", "MatMul", "Mul", "Reshape", "Softmax", "Transpose"}
_UNIT_NORM = {"Clip", "Div", "Expand", "ReduceL2"}
OPERATORS = {
    "vision_encoder": _TOKENS | {"Concat", "Conv", "Expand", "Gather", "Shape"},
    "query_encoder": _TOKENS
    | _UNIT_NORM
    | {"Cast", "Concat", "Einsum", "Gather", "ReduceMean", "Shape", "Slice", "Squeeze", "Sub", "Unsqueeze"},
    "target_encoder": _TOKENS | _UNIT_NORM | {"Concat", "Shape"},
    "attribute_heads": (_TOKENS | _UNIT_NORM | {"Cast", "Concat", "Einsum", "Gemm", "ReduceSum", "Shape", "Sigmoid", "Sub", "Unsqueeze"})
    - {"Reshape", "Transpose"},
}
BESIDES = {"f32": set(), "f16": {"Cast"}, "int8-static": {"DequantizeLinear", "QuantizeLinear"}}  # type: ignore[var-annotated]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of each kind, and a pool in the query encoder."""
    return write_checkpoint(tmp_path_factory.mktemp("deep") / "model", CONFIG)


@pytest.fixture(scope="module")
def exported(checkpoint: Path, garments: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Bundles for GPUs in each precision, and one for CPUs in float16, by the command line."""
    root = tmp_path_factory.mktemp("bundles")
    for precision in BESIDES:
        arguments = ["--precision", precision, "--target", "cuda", *(["--data", str(garments)] if precision == "int8-static" else [])]
        assert main([str(checkpoint), str(root / precision), *arguments]) == 0
    assert main([str(checkpoint), str(root / "cpu"), "--precision", "f16"]) == 0
    return {path.name: path for path in root.iterdir()}


# -- the form ---------------------------------------------------------------------------------------------------------------


def described(path: Path) -> tuple[list[tuple[Any, ...]], set[Any]]:
    """Of each attention: queries, width of a head, keys, mask; and the numbers of heads."""
    proto = onnx.load(path)
    del proto.graph.value_info[:]
    proto = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    values = (*proto.graph.value_info, *proto.graph.input)
    shapes = {v.name: [d.dim_value or d.dim_param for d in v.type.tensor_type.shape.dim] for v in values}
    nodes = {node.name: node for node in proto.graph.node}
    found, heads = [], set()
    for block in attention_blocks(proto.graph):
        q, k, v = (shapes[name] for name in (*nodes[block.first].input, nodes[block.last].input[1]))
        assert 1 not in (q[0], k[0], v[0])  # no queries that are broadcast to all images
        assert q[1] == k[1] == v[1]
        heads.add(q[1])
        queries, keys = (size if isinstance(size, int) else "text" for size in (q[2], k[3]))
        found.append((queries, q[3], keys, "masked" if block.mask else ""))
    return found, heads


@pytest.mark.parametrize("precision", BESIDES)
@pytest.mark.parametrize("spec", GRAPHS, ids=lambda s: s.name)
def test_operators_and_attention_of_every_graph(exported: dict[str, Path], spec: GraphSpec, precision: str) -> None:
    path = exported[precision] / spec.file
    graph = onnx.load(path).graph
    found, heads = described(path)
    assert found == ATTENTION[spec.name]
    assert heads == ({HEADS} if found else set())
    assert all(block.quantised == (precision == "int8-static") for block in attention_blocks(graph))
    assert {node.op_type for node in graph.node} == OPERATORS[spec.name] | BESIDES[precision]
    pools = {"query_encoder": 1, "attribute_heads": 1}.get(spec.name, 0)
    assert sum(node.op_type == "Softmax" for node in graph.node) == len(found) + pools


def test_8_bits_stand_where_fused_attention_wants_them(exported: dict[str, Path]) -> None:
    """Before the first product, after the softmax, and after the last product, which is the input of the next layer."""
    for spec in (VISION_ENCODER, QUERY_ENCODER, TARGET_ENCODER):
        graph = onnx.load(exported["int8-static"] / spec.file).graph
        nodes, readers = {node.name: node for node in graph.node}, {name: node for node in graph.node for name in node.input}
        for block in attention_blocks(graph):
            node, path = nodes[block.last], []
            while node.op_type != "QuantizeLinear":
                node = readers[node.output[0]]
                path.append(node.op_type)
            assert path == ["Transpose", "Reshape", "QuantizeLinear"]


def test_pools_keep_their_softmax_in_float32(exported: dict[str, Path]) -> None:
    graph = onnx.load(exported["f16"] / QUERY_ENCODER.file).graph
    fused = {block.softmax for block in attention_blocks(graph)}
    made = {name: node for node in graph.node for name in node.output}
    (pool,) = (node for node in graph.node if node.op_type == "Softmax" and node.name not in fused)
    cast = made[pool.input[0]]
    assert (cast.op_type, cast.attribute[0].i) == ("Cast", TensorProto.FLOAT)


@pytest.mark.parametrize("spec", GRAPHS, ids=lambda s: s.name)
def test_graphs_for_cpus_are_in_another_form(exported: dict[str, Path], spec: GraphSpec) -> None:
    assert not list(attention_blocks(onnx.load(exported["cpu"] / spec.file).graph))


def insert(kind: str, where: str, graph: onnx.GraphProto, **attributes: Any) -> None:
    """A node of this kind after the first attention's node `where`."""
    block = next(iter(attention_blocks(graph)))
    at, node = next((i, node) for i, node in enumerate(graph.node) if node.name == getattr(block, where))
    name, node.output[0] = node.output[0], "before"
    graph.node.insert(at + 1, helper.make_node(kind, ["before"], [name], "inserted", **attributes))


def scale_last(graph: onnx.GraphProto) -> None:
    """The scale after the first product, where PyTorch's `eager` attention has it."""
    block = next(iter(attention_blocks(graph)))
    scale, first = (next(node for node in graph.node if node.name == name) for name in (block.scale, block.first))
    (first.input[0], scale.input[0]), product = (scale.input[0], "product"), first.output[0]
    first.output[0], scale.output[0] = "product", product


def read_twice(graph: onnx.GraphProto) -> None:
    block = next(iter(attention_blocks(graph)))
    softmax = next(node for node in graph.node if node.name == block.softmax)
    graph.node.append(helper.make_node("Identity", [softmax.output[0]], ["seen"], "inserted"))


def other_axis(graph: onnx.GraphProto) -> None:
    block = next(iter(attention_blocks(graph)))
    next(node for node in graph.node if node.name == block.softmax).attribute[0].i = 2


@pytest.mark.parametrize(
    "change",
    [
        *(partial(insert, "Cast", where, to=TensorProto.FLOAT) for where in ("scale", "first", "mask", "softmax")),
        partial(insert, "Identity", "softmax"),
        scale_last,
        read_twice,
        other_axis,
    ],
)
def test_another_form_is_not_taken_for_it(exported: dict[str, Path], change: Callable[[onnx.GraphProto], None]) -> None:
    graph = onnx.load(exported["f32"] / QUERY_ENCODER.file).graph
    before = list(attention_blocks(graph))
    change(graph)
    assert list(attention_blocks(graph)) == before[1:]


# -- what is in the bundle --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("short", "precision"), [("f32", "float32"), ("f16", "float16"), ("int8-static", "int8-static")])
def test_the_gates_are_those_of_graphs_for_cpus(exported: dict[str, Path], short: str, precision: Precision) -> None:
    manifest = Bundle.load(exported[short]).manifest
    assert (manifest.target, manifest.precision, manifest.tolerance) == ("cuda", precision, TOLERANCES[precision])
    assert [parity.graph for parity in manifest.parity] == [*(spec.name for spec in GRAPHS), "composed_query"]
    for parity in manifest.parity:
        assert {shape["batch"] for shape in parity.shapes} >= {1, 2, 7, 33}
        assert all(output.cosine_min >= manifest.tolerance.min_cosine for output in parity.outputs.values())
        assert parity.batch_dependence is not None


def test_an_index_belongs_to_one_form_and_heads_to_both(exported: dict[str, Path]) -> None:
    gpu, cpu = (Bundle.load(exported[name]) for name in ("f16", "cpu"))
    assert cpu.manifest.target == "cpu"
    assert gpu.model_hash != cpu.model_hash
    assert gpu.manifest.encoder_hash == cpu.manifest.encoder_hash
    assert (gpu.path / ATTRIBUTE_HEADS.file).read_bytes() == (cpu.path / ATTRIBUTE_HEADS.file).read_bytes()


def test_heads_alone_fit_a_bundle_for_gpus(checkpoint: Path, exported: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(exported["f16"], tmp_path / "bundle")
    assert main([str(checkpoint), str(tmp_path / "heads"), "--heads-only", "--precision", "f16"]) == 0
    assert replace_heads(tmp_path / "bundle", tmp_path / "heads").target == "cuda"


def test_the_report_names_the_target(exported: dict[str, Path]) -> None:
    for name, target, words in (("f16", "cuda", "float16, for GPUs"), ("cpu", "cpu", "float16, for CPUs")):
        assert parse_json(ExportReport, (exported[name] / "report.json").read_bytes(), where="report").target == target
        assert words in (exported[name] / "report.html").read_text()


def test_8_bits_of_the_cpu_are_refused(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(checkpoint), str(tmp_path / "out"), "--precision", "int8", "--target", "cuda"]) == 2
    error = capsys.readouterr().err
    assert "int8 scales activations while it runs, which is for CPUs; for --target cuda take f16 or int8-static" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("options", "target"), [([], "cpu"), (["--target", "cuda"], "cuda"), (["--trt"], "cuda")])
def test_engines_are_built_from_graphs_for_gpus(
    checkpoint: Path, tmp_path: Path, options: list[str], target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(_: Any, __: Path, given: ExportOptions, **___: Any) -> None:
        raise InputError(given.target)

    monkeypatch.setattr(bundle_module, "export_bundle", stop)
    with pytest.raises(InputError, match=f"^{target}$"):
        _export(build_parser().parse_args([str(checkpoint), str(tmp_path / "out"), *options]))


# -- float16 ----------------------------------------------------------------------------------------------------------------


def half(x: Tensor) -> Tensor:
    """Rounded to float16, in float32."""
    return x.half().float()


def attend_in_float16(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, mask: Tensor | None = None, *, sums: bool = False
) -> Tensor:
    """`attend` with every intermediate value rounded to float16, by NumPy; exponentials and their sum, too, with `sums`, which is more than
    kernels round. Products are summed in float32, as tensor cores do."""
    query, key, value = (half(x) for x in (query, key, value))
    scores = half(half(query * half(torch.tensor(scaling))) @ key.transpose(-1, -2))
    if mask is not None:
        scores = half(scores + half(mask))
    dtype = np.float16 if sums else np.float32
    given = scores.numpy().astype(dtype)
    powers = np.exp(given - given.max(axis=-1, keepdims=True))
    probabilities = half(torch.from_numpy((powers / powers.sum(axis=-1, keepdims=True, dtype=dtype)).astype(np.float32)))
    output = half(probabilities @ value).transpose(1, 2)
    return output.reshape(*output.shape[:2], -1)


@pytest.mark.parametrize("sums", [False, True], ids=["sums in float32", "sums in float16"])
@pytest.mark.parametrize("spec", [VISION_ENCODER, QUERY_ENCODER, TARGET_ENCODER], ids=lambda s: s.name)
def test_float16_attention_stays_within_the_gate(spec: GraphSpec, sums: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime's CPU provider computes float16 softmax in float32. Here PyTorch's model does all of its attention in float16, and
    nothing else."""
    model = make_model(CONFIG)
    reference = Reference(spec, model)
    monkeypatch.setattr(gpu_module, "attend", partial(attend_in_float16, sums=sums))

    def evaluate(**given: Tensor) -> dict[str, Tensor]:
        with gpu_attention(model):
            outputs = graph_module(spec, model)(**given)
        return dict(zip((t.name for t in spec.outputs), outputs if isinstance(outputs, tuple) else (outputs,), strict=True))

    changed = False
    for exact, rounded in zip(reference.cases(), reference.of(evaluate), strict=True):
        for name, expected in exact.expected.items():
            found = rounded.expected[name]
            error = np.abs(found - expected).max() / max(1.0, np.abs(expected).max())
            cosine = (found * expected).sum(-1) / np.linalg.norm(found, axis=-1) / np.linalg.norm(expected, axis=-1)
            changed |= bool(error > 0)
            assert error <= TOLERANCES["float16"].max_error, (name, exact.shape)
            assert cosine.min() >= TOLERANCES["float16"].min_cosine, (name, exact.shape)
    assert changed
