"""Schemes of 8-bit products side by side: what each loses, how far an answer depends on its batch, size, and time beside PyTorch.

    python -m benchmarks.int8_schemes demo/runs/dqe-0/model      # a trained model: errors, batch dependence
    python -m benchmarks.int8_schemes --full-size                # BLIP-2's query encoder with random weights: time and size

`dqe_export.row_int8` is the one that bundles use. The others are here to be measured, and are what ONNX Runtime offers.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from dqe_engine.contracts.graphs import GRAPHS, QUERY_ENCODER, GraphSpec
from dqe_engine.contracts.preprocessing import PreprocessingSpec
from dqe_engine.sessions import OnnxSession
from dqe_export.graphs import graph_module, random_inputs
from dqe_export.onnx_graph import export_graph
from dqe_export.precision import convert
from dqe_training.checkpointing.checkpoint import load_checkpoint
from dqe_training.config import ModelConfig
from dqe_training.data.garments.catalog import vocabulary
from dqe_training.model import DQEModel
from dqe_training.model.cross_attention import upstream_attention

from . import machine, report
from .export_full_size import QFORMER, TOWERS

Arrays = Mapping[str, NDArray[Any]]
Convert = Callable[[Path, Path], None]
_ROUNDS = 15
_PACKAGES = ("onnxruntime", "torch")


def per_tensor(**options: Any) -> Convert:
    """ONNX Runtime's dynamic quantisation: one scale for all activations of a call."""

    def write(source: Path, path: Path) -> None:
        from onnxruntime.quantization import quantize_dynamic

        quantize_dynamic(
            source, path, op_types_to_quantize=["MatMul", "Gemm", "Gather"], per_channel=True,
            extra_options={"MatMulConstBOnly": True, "DefaultTensorType": onnx.TensorProto.FLOAT}, **options,
        )  # fmt: skip

    return write


def blocks(bits: int, size: int, *, accuracy_level: int = 4) -> Convert:
    """`MatMulNBits`: a scale per block of weights, and at accuracy level 4 also of activations; 8 bits of the activations at level 4."""

    def write(source: Path, path: Path) -> None:
        from onnxruntime.capi import _pybind_state as native

        proto = onnx.load(source)
        weights = {t.name: t for t in proto.graph.initializer if len(t.dims) == 2}
        quantise = native.quantize_matmul_8bits if bits == 8 else native.quantize_matmul_4bits
        for node in proto.graph.node:
            if node.op_type != "MatMul" or node.input[1] not in weights:
                continue
            matrix = np.ascontiguousarray(numpy_helper.to_array(weights[node.input[1]]))
            (width, columns), count = matrix.shape, -(-matrix.shape[0] // size)
            codes, scales = np.zeros((columns, count, size * bits // 8), np.uint8), np.zeros(columns * count, np.float32)
            quantise(
                codes, matrix, scales, np.zeros(columns * (count if bits == 8 else (count + 1) // 2), np.uint8), size, columns, width, True
            )
            names = [f"{node.output[0]}_codes", f"{node.output[0]}_scales"]
            proto.graph.initializer.extend(numpy_helper.from_array(a, name) for a, name in zip((codes, scales), names, strict=True))
            attributes = {"K": width, "N": columns, "bits": bits, "block_size": size, "accuracy_level": accuracy_level}
            inputs, output = [node.input[0], *names], node.output[0]
            node.CopyFrom(helper.make_node("MatMulNBits", inputs, [output], name=node.name, domain="com.microsoft", **attributes))
        used = {name for node in proto.graph.node for name in node.input}
        kept = [t for t in proto.graph.initializer if t.name in used]
        del proto.graph.initializer[:]
        proto.graph.initializer.extend(kept)
        proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))
        onnx.save(proto, path)

    return write


def schemes() -> dict[str, Convert]:
    from onnxruntime.quantization import QuantType

    return {
        "rows, 7-bit weights (ours)": lambda source, path: convert(source, path, "int8"),
        "per tensor, signed weights": per_tensor(weight_type=QuantType.QInt8),
        "per tensor, reduce_range": per_tensor(weight_type=QuantType.QInt8, reduce_range=True),
        "per tensor, unsigned weights": per_tensor(weight_type=QuantType.QUInt8),
        "MatMulNBits, 8 bits, blocks of 32": blocks(8, 32),
        "MatMulNBits, 8 bits, blocks of 128": blocks(8, 128),
        "MatMulNBits, 4 bits, blocks of 32": blocks(4, 32),
        "MatMulNBits, 8-bit weights alone": blocks(8, 32, accuracy_level=1),
    }


def error(session: OnnxSession, exact: OnnxSession, inputs: Arrays) -> tuple[float, float]:
    """Least cosine of any output vector with float32's, and the mean."""
    found, expected = session.run(**inputs), exact.run(**inputs)
    cosines = []
    for name in found:
        a, b = (array.astype(np.float64).reshape(-1, array.shape[-1]) for array in (found[name], expected[name]))
        cosines.append((a * b).sum(axis=1) / np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-30))
    every = np.concatenate(cosines)
    return float(every.min()), float(every.mean())


def company(session: OnnxSession, inputs: Arrays) -> float:
    """Largest difference of any output between a row alone and the same row in the batch."""
    together = session.run(**inputs)
    alone = [
        session.run(**{name: array[row : row + 1] for name, array in inputs.items()}) for row in range(len(next(iter(inputs.values()))))
    ]
    return max(float(np.abs(together[name] - np.concatenate([a[name] for a in alone])).max()) for name in together)


def in_turns(calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Medians in milliseconds of calls that take turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(_ROUNDS):
        for name, call in calls.items():
            begun = time.perf_counter()
            call()
            times[name].append(1000 * (time.perf_counter() - begun))
    return {name: statistics.median(taken) for name, taken in times.items()}


def arrays(spec: GraphSpec, model: DQEModel, *, batch: int, text_length: int = 12) -> dict[str, NDArray[Any]]:
    vocab_size = model.embeddings.word_embeddings.num_embeddings
    inputs = random_inputs(spec, model.sizes, vocab_size, batch=batch, text_length=text_length, seed=0)
    return {name: value.numpy() for name, value in inputs.items()}


@torch.inference_mode()
def trained(checkpoint: Path, folder: Path) -> list[list[str]]:
    model, rows = load_checkpoint(checkpoint).model.eval(), []
    with upstream_attention(model.qformer):
        for spec in GRAPHS:
            export_graph(spec, model, folder / spec.file)
    for name, write in schemes().items():
        sizes, found = [], []
        for spec in GRAPHS:
            source, path = folder / spec.file, folder / f"int8-{spec.file}"
            write(source, path)
            inputs = arrays(spec, model, batch=33)
            session, exact = (OnnxSession(p, spec, model.sizes, provider="cpu") for p in (path, source))
            sizes.append((path.stat().st_size, source.stat().st_size))
            found.append((*error(session, exact, inputs), company(session, inputs)))
        least = [f"{1 - cosine:.1e}" for cosine, _, _ in found]
        share = sum(a for a, _ in sizes) / sum(b for _, b in sizes)
        rows.append([name, *least, f"{max(difference for _, _, difference in found):.0e}", f"{share:.2f}"])
    return [["scheme", *(f"1 - least cosine, {spec.name}" for spec in GRAPHS), "alone and in 33", "of float32"], *rows]


@torch.inference_mode()
def full_size(folder: Path, threads: int) -> list[list[str]]:
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    config = ModelConfig(preprocessing=PreprocessingSpec(image_size=224), vision=TOWERS["vit-g"], qformer=QFORMER)
    assert QFORMER.vocab_size is not None
    model = DQEModel(config, vocabulary(), QFORMER.vocab_size, empty_vision=True).eval()  # the tower is not needed
    spec, source, paths = QUERY_ENCODER, folder / QUERY_ENCODER.file, dict[str, Path]()
    with upstream_attention(model.qformer):
        export_graph(spec, model, source)
    for position, (name, write) in enumerate(schemes().items()):
        paths[name] = folder / f"{position}-{spec.file}"
        write(source, paths[name])
    module, sessions = (
        graph_module(spec, model),
        {n: OnnxSession(p, spec, model.sizes, provider="cpu", threads=threads) for n, p in paths.items()},
    )
    columns = []
    for batch in (1, 8):
        inputs = arrays(spec, model, batch=batch)
        tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
        calls: dict[str, Callable[[], object]] = {"PyTorch": partial(module, **tensors)}
        columns.append(in_turns(calls | {name: partial(session.run, **inputs) for name, session in sessions.items()}))
    rows = [["PyTorch eager, float32", "1", *(f"{times['PyTorch']:,.1f}" for times in columns), "1", "1"]]
    for name, path in paths.items():
        share, ratios = path.stat().st_size / source.stat().st_size, [f"{times['PyTorch'] / times[name]:.1f}" for times in columns]
        rows.append([name, f"{share:.2f}", *(f"{times[name]:,.1f}" for times in columns), *ratios])
    return [["scheme", "of float32", "batch 1, ms", "batch 8, ms", "times PyTorch, batch 1", "batch 8"], *rows]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="int8_schemes", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("checkpoint", type=Path, nargs="?", help="a trained model, for errors")
    parser.add_argument("--full-size", action="store_true", help="time BLIP-2's query encoder instead; 8 GiB of memory")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    if (options.checkpoint is None) != options.full_size:
        parser.error("name a checkpoint, or --full-size")
    logging.disable(logging.WARNING)  # advice of the quantiser
    with TemporaryDirectory() as folder:
        head, *rows = full_size(Path(folder), options.threads) if options.full_size else trained(options.checkpoint, Path(folder))
    print(report.table(head, rows))
    print(machine.describe(_PACKAGES))
    return 0


if __name__ == "__main__":
    sys.exit(main())
