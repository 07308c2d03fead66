"""What TensorRT cannot build, known from a name, a graph or a GPU before anything is built: each check raises the line that says so."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx

from dqe_engine.bundle import Bundle
from dqe_engine.contracts.graphs import GraphSpec
from dqe_engine.contracts.manifest import Precision
from dqe_engine.errors import BackendError, InputError
from dqe_engine.tensorrt.cuda import Gpu

from .plan import BuildOptions

WITHOUT_IMPORTER = frozenset({"ConvInteger", "DynamicQuantizeLinear", "MatMulInteger", "QLinearConv", "QLinearMatMul"})
"""ONNX's operators on whole numbers, none of which ONNX-TensorRT reads (its list for TensorRT 10.0). Not a list of all that it lacks: the
build finds those, after minutes."""
_OLDEST_COMPATIBLE = 8  # major compute capability: Ampere


def check_precision(precision: Precision) -> None:
    """Raises InputError for int8, whose scales are taken from the activations while it runs."""
    if precision == "int8":
        raise InputError(
            "int8 takes its scales while it runs and multiplies whole numbers (MatMulInteger), which TensorRT has no operator for; "
            "export with --precision f16, or with int8-static and --data, whose scales are fixed"
        )


def check_gpu(gpu: Gpu, options: BuildOptions) -> None:
    """Raises BackendError for a GPU that the options leave out."""
    if options.hardware_compatible and int(gpu.compute_capability.split(".")[0]) < _OLDEST_COMPATIBLE:
        raise BackendError(f"{gpu.name}: --hardware-compatible needs compute capability 8.0 or newer, this has {gpu.compute_capability}")


def check_bundle(bundle: Bundle) -> None:
    """Raises InputError for a bundle of which a graph cannot be built."""
    check_precision(bundle.manifest.precision)
    for spec in bundle.manifest.graphs:
        check_operators(spec, operators(bundle.path / spec.file))


def check_operators(spec: GraphSpec, found: Counter[str]) -> None:
    """Raises InputError for a graph with operators that TensorRT does not read; `found`: those of `operators`."""
    if lacking := sorted(name for name in found if name in WITHOUT_IMPORTER or "." in name):
        raise InputError(
            f"{spec.name}: TensorRT has no operator {', '.join(lacking)}; export the bundle in another precision, or use ONNX Runtime"
        )


def operators(path: Path) -> Counter[str]:
    """How often each operator occurs in a graph; those of other domains than ONNX's own carry its name: "com.microsoft.Gelu".

    Subgraphs, which our graphs have none of, are not looked at. The weights stay on the disk.
    """
    nodes = onnx.load(path, load_external_data=False).graph.node
    return Counter(node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}" for node in nodes)
