"""Every word of the vocabulary through the part of the query encoder that looks words up: all rows, for the price of a copy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from dqe_engine.contracts.graphs import QUERY_ENCODER
from dqe_engine.errors import ParityError
from dqe_training.model import DQEModel

_AT_ONCE = 16_384
"""Words looked up in one call."""
_IDS, _WORDS = "input_ids", "word_embeddings"


@torch.inference_mode()
def looked_up(model: DQEModel, path: Path) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Embeddings (N, H) by the query encoder `path` and by PyTorch, of all words in the order of their ids, some thousands at a time.

    Raises ParityError where the graph's embedding of a word depends on more than its id.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(_lookup(path).SerializeToString(), options, providers=["CPUExecutionProvider"])
    table = model.embeddings.word_embeddings.weight
    for ids in torch.arange(len(table)).split(_AT_ONCE):
        (found,) = session.run([_WORDS], {_IDS: ids[None].numpy()})
        yield found[0], table[ids].numpy()


def _lookup(path: Path) -> onnx.ModelProto:
    """The nodes of the graph `path` from `input_ids` to `word_embeddings`, alone, with their weights."""
    proto = onnx.load(path, load_external_data=False)
    made = {name: position for position, node in enumerate(proto.graph.node) for name in node.output}
    weights = {tensor.name: tensor for tensor in proto.graph.initializer}
    wanted, nodes, found = [_WORDS], set[int](), dict[str, onnx.TensorProto]()
    while wanted:
        name = wanted.pop()
        if name in made:
            if made[name] not in nodes:
                nodes.add(made[name])
                wanted += [given for given in proto.graph.node[made[name]].input if given]
        elif name in weights:
            found[name] = _loaded(weights[name], path)
        elif name != _IDS:
            raise ParityError(f"{QUERY_ENCODER.name}: {_WORDS} depends on {name}, not on the words alone; nothing was written")
    in_order = [proto.graph.node[position] for position in sorted(nodes)]
    ids, words = (next(v for v in values if v.name == n) for values, n in ((proto.graph.input, _IDS), (proto.graph.output, _WORDS)))
    graph = onnx.helper.make_graph(in_order, _WORDS, [ids], [words], list(found.values()))
    return onnx.helper.make_model(graph, opset_imports=proto.opset_import, ir_version=proto.ir_version, functions=proto.functions)


def _loaded(tensor: onnx.TensorProto, path: Path) -> onnx.TensorProto:
    """A copy that holds its values, which may be in a file beside the graph."""
    copy: Any = onnx.TensorProto()
    copy.CopyFrom(tensor)
    if onnx.external_data_helper.uses_external_data(copy):
        onnx.external_data_helper.load_external_data_for_tensor(copy, str(path.parent))
        copy.data_location = onnx.TensorProto.DEFAULT
        del copy.external_data[:]
    return copy
