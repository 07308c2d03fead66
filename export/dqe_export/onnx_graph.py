"""One graph to ONNX by the dynamo exporter: stated opset, symbolic axes asserted, nothing of this machine inside."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import onnx
import torch

from dqe_engine.contracts.graphs import DYNAMIC_AXES, GraphSpec
from dqe_engine.errors import ExportError
from dqe_training.model import DQEModel
from dqe_training.model.vision import eager_attention

from .decompositions import decomposed_by_hand
from .folding import fold_constants
from .graphs import dynamic_shapes, graph_module, random_inputs

OPSET = 20  # 17 silently becomes 18; 23 and 24 emit `Attention`, which ONNX Runtime's CPU provider refuses with our masks
_EXTERNAL_DATA_LIMIT = 1_900_000_000  # bytes; protobuf's own limit is 2 GiB


def export_graph(spec: GraphSpec, model: DQEModel, path: Path) -> None:
    """Write `path`. Raises ExportError when the graph's interface is not `spec`'s, or an axis was baked in."""
    sizes = model.sizes
    vocab_size = model.embeddings.word_embeddings.num_embeddings
    # An example batch or text length of 1 silently bakes in 1, so the example has neither.
    example = random_inputs(spec, sizes, vocab_size, batch=3, text_length=min(6, model.config.qformer.max_text_length), seed=0)
    for name in ("torch.onnx", "onnxscript"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings(), decomposed_by_hand(), eager_attention(model.vision_model):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            graph_module(spec, model),
            kwargs=example,
            dynamo=True,
            opset_version=OPSET,
            input_names=[t.name for t in spec.inputs],
            output_names=[t.name for t in spec.outputs],
            dynamic_shapes=dynamic_shapes(spec, model.config.qformer.max_text_length),
            external_data=False,
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    _strip_metadata(proto)
    fold_constants(proto)
    _check_interface(spec, proto)
    save_graph(proto, path)


def save_graph(proto: onnx.ModelProto, path: Path) -> None:
    """Write and check `path`; weights beside it where protobuf could not hold them."""
    large = sum(tensor.ByteSize() for tensor in proto.graph.initializer) > _EXTERNAL_DATA_LIMIT  # a large graph's own size is an error
    beside = weights_beside(path)
    beside.unlink(missing_ok=True)  # weights would be appended to it
    onnx.save_model(proto, path, save_as_external_data=large, location=beside.name if large else None)
    if large:
        beside.chmod(path.stat().st_mode)  # onnx makes it for its owner alone
    onnx.checker.check_model(str(path))


def weights_beside(path: Path) -> Path:
    """Where the weights of the graph `path` are, if it is too large to hold them."""
    return path.with_name(f"{path.name}.data")


def _strip_metadata(proto: onnx.ModelProto) -> None:
    """The exporter records source paths and stack traces per node: private, and as large as a small model."""
    del proto.metadata_props[:]
    proto.doc_string = ""
    for graph in (proto.graph, *proto.functions):
        for holder in (graph, *graph.node, *getattr(graph, "value_info", ()), *getattr(graph, "initializer", ())):
            if hasattr(holder, "metadata_props"):
                del holder.metadata_props[:]
            if getattr(holder, "doc_string", ""):
                holder.doc_string = ""


def _check_interface(spec: GraphSpec, proto: onnx.ModelProto) -> None:
    for declared, found in ((spec.inputs, proto.graph.input), (spec.outputs, proto.graph.output)):
        if [t.name for t in declared] != [v.name for v in found]:
            raise ExportError(f"{spec.name}: graph has {[v.name for v in found]}, the spec declares {[t.name for t in declared]}")
        for tensor, value in zip(declared, found, strict=True):
            dims = value.type.tensor_type.shape.dim
            for axis, dim in zip(tensor.axes, dims, strict=True):
                if axis in DYNAMIC_AXES and not dim.dim_param:
                    raise ExportError(f"{spec.name}: axis {axis!r} of {tensor.name} was baked in as {dim.dim_value}")
                if isinstance(axis, str) and dim.dim_param:
                    dim.dim_param = axis
