"""`engines.json`, the sidecar of a folder of TensorRT engines: what they were built from, on, and for.

Plans carry no metadata of their own, so everything that decides whether an engine may be loaded stands here.
"""

from __future__ import annotations

import re
from typing import ClassVar, Literal

from .manifest import FileEntry, GraphParity, Tolerance
from .parsing import Contract
from .versioned import Versioned

ENGINES_SCHEMA_VERSION, _OLDEST_SCHEMA = 4, 3
"""Version 3 had no `kind`."""
ENGINES_FILE = "engines.json"
ENGINES_FOLDER = "tensorrt"  # within a bundle; a manifest's `model_hash` leaves out what is below it


class AxisRange(Contract, frozen=True):
    """Sizes of one dynamic axis: any of `min` to `max` runs, `opt` is what the engine is tuned for."""

    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max:
            raise ValueError(f"expected 1 <= min <= opt <= max, got {self.min}:{self.opt}:{self.max}")


class Profile(Contract, frozen=True):
    """One optimisation profile. Graphs without texts use `batch` alone."""

    batch: AxisRange
    text_length: AxisRange  # tokens, special ones included

    def sizes(self, which: str) -> dict[str, int]:
        """Both axes at "min", "opt" or "max"."""
        return {"batch": getattr(self.batch, which), "text_length": getattr(self.text_length, which)}


class EngineEntry(Contract, frozen=True):
    """One engine: its file in the folder, what the engine inspector says of it, and how it compares.

    `graph_hash` is the manifest's of the graph that it was built from: an engine outlives the replacement of other graphs.
    `layer_types` counts layers by type. `device_memory`: bytes of activations, weights not included. `graph_shapes`: the
    shapes that run as CUDA graphs. `parity` is with ONNX Runtime's CPU provider on the same graph, within `tolerance`, the bundle's own.
    """

    graph: str
    graph_hash: str
    file: FileEntry
    build_seconds: float
    layers: int
    layer_types: dict[str, int]
    device_memory: int
    graph_shapes: tuple[dict[str, int], ...]
    tolerance: Tolerance
    parity: GraphParity


class EngineManifest(Versioned, frozen=True, kw_only=True):
    """`precision` is the bundle's: engines are strongly typed, so the ONNX graph decides it, and `tf32` alone adds to it.

    `compute_capability`: "9.0". `tensorrt`: the full version. `cuda_driver`: the newest CUDA that the driver supports, "13.0".
    `workspace`: bytes, None for all of the device's memory.
    """

    OLDEST_SCHEMA: ClassVar[int] = _OLDEST_SCHEMA

    kind: Literal["tensorrt-engines"] = "tensorrt-engines"
    schema_version: int = ENGINES_SCHEMA_VERSION
    precision: str
    gpu: str
    compute_capability: str
    tensorrt: str
    cuda_driver: str
    hardware_compatible: bool
    version_compatible: bool
    tf32: bool
    optimization_level: int
    workspace: int | None
    profiles: tuple[Profile, ...]
    engines: tuple[EngineEntry, ...]

    def refusal(self, *, gpu: str, compute_capability: str, tensorrt: str, graph: str, graph_hash: str) -> str:
        """Why the engine of `graph` cannot run there, in a few words; "" where it can.

        Models of GPUs differ within one compute capability, in memory and in numbers of multiprocessors: TensorRT loads an engine of
        another model with a warning that it may be slow or fail, so it is refused here unless it was built to be compatible.
        """
        if any(entry.graph == graph and entry.graph_hash != graph_hash for entry in self.engines):
            return f"{graph} was built from another export"
        if self.hardware_compatible:
            if _numbers(compute_capability) < _AMPERE:
                return "hardware-compatible engines need compute capability 8.0 or newer"
        elif self.compute_capability != compute_capability:
            return f"built for compute capability {self.compute_capability}"
        elif self.gpu != gpu:
            return f"built on {self.gpu}"
        if self.tensorrt != tensorrt:
            if not self.version_compatible:
                return f"built with TensorRT {self.tensorrt}"
            if _numbers(tensorrt) < _numbers(self.tensorrt):
                return f"built with TensorRT {self.tensorrt}, which is newer"
        return ""


_AMPERE = (8, 0)


def _numbers(version: str) -> tuple[int, ...]:
    """The numbers of "10.16.1.11" or "10.13.3.9.post1", for comparing."""
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def folder_name(
    gpu: str, compute_capability: str, tensorrt: str, *, hardware_compatible: bool = False, version_compatible: bool = False
) -> str:
    """Name of the folder that holds the engines of one model of GPU and one version, such as "nvidia-l4-sm89-10.16".

    Compatible engines have a name of their own, "sm80+-10.16+", so that they may lie beside faster ones that fit one GPU.
    """
    major, minor = _numbers(tensorrt)[:2]
    model = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    device = "sm80+" if hardware_compatible else f"{model}-sm{compute_capability.replace('.', '')}"
    return f"{device}-{major}.{minor}{'+' if version_compatible else ''}"
