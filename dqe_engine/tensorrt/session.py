"""A graph that runs as a TensorRT engine: device buffers made once, CUDA graphs of the usual sizes, no torch."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count, takewhile
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..binding import Arrays, Binding
from ..contracts.engines import AxisRange
from ..contracts.graphs import DYNAMIC_AXES, GraphSizes, GraphSpec, TensorSpec
from ..errors import BackendError, BundleError, InputError
from ..forks import ProcessBound
from .api import import_tensorrt, load_engine, make_logger, refusals
from .cuda import Cuda

_DTYPES = {"float32": "FLOAT", "int64": "INT64"}  # a spec's dtype -> the name in trt.DataType
_SHORTEST_BUCKET = 8
"""Tokens. Texts are padded to the next of 8, 16, 32, ..., so that a few CUDA graphs serve all of them."""


@dataclass
class _Context:
    """An execution context and what it is set to."""

    context: Any
    profile: int = -1
    shape: tuple[tuple[str, int], ...] = ()


class TensorRTSession(ProcessBound):
    """An engine bound to `spec`, on one stream of the CUDA device that is current where it is made. Threads take turns.

    Buffers for the largest shapes of all profiles are allocated here and stay. The optimal batch of each profile is captured as a CUDA
    graph, with texts of every length in `text_buckets` that the profile takes; `graph_shapes` says which succeeded (engines with loops,
    for instance, cannot be), all other shapes are enqueued one by one. A batch beyond the profiles runs in equal parts.

    Raises BackendError where there is no device, no TensorRT or too little memory, and where the plan is another
    version's or GPU's; BundleError where the engine's tensors are not the spec's.
    """

    provider = "tensorrt"

    def __init__(self, plan: bytes, spec: GraphSpec, sizes: GraphSizes, *, host_code: bool = False) -> None:
        assert all(tensor.axes[0] == "batch" for tensor in (*spec.inputs, *spec.outputs)), "requests are split along the first axis"
        self.spec = spec
        self._sizes, self._binding = sizes, Binding(spec, sizes)
        self._lock = threading.Lock()
        self._cuda = Cuda()
        self._device = self._cuda("cudaGetDevice")
        self._trt = import_tensorrt()
        self._logger = make_logger(self._trt)
        with contextlib.ExitStack() as release:
            self._engine = load_engine(self._trt, plan, self._logger, host_code=host_code)
            _check_tensors(self._trt, self._engine, spec)
            self._profiles = tuple(_read_profile(self._engine, spec, i) for i in range(self._engine.num_optimization_profiles))
            _check_shapes(self._engine, spec, sizes, self._profiles)
            self._stream = self._cuda("cudaStreamCreateWithFlags", self._cuda.runtime.cudaStreamNonBlocking)
            release.callback(self._cuda.release, "cudaStreamDestroy", self._stream)
            self._buffers = {tensor.name: self._allocate(self._largest(tensor), release) for tensor in (*spec.inputs, *spec.outputs)}
            # All contexts work in the same memory, since they run one after the other on one stream.
            self._activations = self._allocate(self.device_memory, release)
            self._eager = self._new_context()
            self._graphs: dict[tuple[int, tuple[tuple[str, int], ...]], tuple[Any, _Context]] = {}
            for index, profile in enumerate(self._profiles):
                for dynamic in _usual_sizes(profile):
                    if self._split(dynamic)[0] == index:  # else requests of these sizes run in a tighter profile
                        self._capture(index, dynamic, release)
            self.bind_to_process(weakref.finalize(self, _release, self._cuda, self._device, release.pop_all()))

    @property
    def device_memory(self) -> int:
        """Bytes of activations; weights and buffers come on top."""
        return int(self._engine.device_memory_size_v2)

    @property
    def graph_shapes(self) -> tuple[dict[str, int], ...]:
        """The dynamic sizes that run as CUDA graphs."""
        return tuple(dict(shape) for _, shape in self._graphs)

    @property
    def text_buckets(self) -> tuple[int, ...]:
        """Lengths that texts are best padded to, ascending: those that run as CUDA graphs; empty for a graph without texts."""
        return tuple(sorted({shape["text_length"] for shape in self.graph_shapes if "text_length" in shape}))

    def run(self, **inputs: NDArray[Any]) -> Arrays:
        """See `GraphSession.run`. An empty batch gives empty outputs without touching the device.

        Raises InputError for sizes outside the engine's profiles, BackendError when the device fails, and in a child of `fork`.
        """
        self.check_process()
        dynamic = self._binding.dynamic_sizes(inputs)
        shapes = self._binding.output_shapes(dynamic)
        outputs: Arrays = {tensor.name: np.empty(shapes[tensor.name], tensor.dtype) for tensor in self.spec.outputs}
        if dynamic["batch"] == 0:
            return outputs
        profile, parts = self._split(dynamic)
        contiguous = {name: np.ascontiguousarray(array) for name, array in inputs.items()}
        with self._lock, self._cuda.on(self._device):
            start = 0
            for count in parts:
                rows = slice(start, start + count)
                self._run_part(
                    profile,
                    {**dynamic, "batch": count},
                    {name: array[rows] for name, array in contiguous.items()},
                    {name: array[rows] for name, array in outputs.items()},
                )
                start += count
        return outputs

    def _split(self, dynamic: Mapping[str, int]) -> tuple[int, list[int]]:
        """The profile to use and the batch of each part. The tightest profile that takes the whole batch comes first."""
        batch = dynamic["batch"]
        others = {axis: size for axis, size in dynamic.items() if axis != "batch"}
        usable = [i for i, p in enumerate(self._profiles) if all(p[axis].min <= size <= p[axis].max for axis, size in others.items())]
        if not usable:
            ranges = ", ".join(f"{axis} {p[axis].min} to {p[axis].max}" for p in self._profiles for axis in others)
            raise InputError(
                f"{self.spec.name}: {_describe(others)} is outside the engine's profiles ({ranges}); widen them with --trt-profile"
            )
        whole = [i for i in usable if self._profiles[i]["batch"].min <= batch <= self._profiles[i]["batch"].max]
        if whole:
            return min(whole, key=lambda i: tuple(self._profiles[i][axis].max for axis in dynamic)), [batch]
        for profile in sorted(usable, key=lambda i: self._profiles[i]["batch"].max, reverse=True):
            limits = self._profiles[profile]["batch"]
            parts = -(-batch // limits.max)
            small, larger = divmod(batch, parts)
            if small >= limits.min:
                return profile, [small + 1] * larger + [small] * (parts - larger)
        limits_of = (self._profiles[i]["batch"] for i in usable)
        ranges = ", ".join(f"{limits.min} to {limits.max}" for limits in limits_of)
        raise InputError(
            f"{self.spec.name}: a batch of {batch} is outside the engine's profiles ({ranges} at a time); "
            "build it with a smaller least batch"
        )

    def _run_part(self, profile: int, dynamic: Mapping[str, int], inputs: Arrays, outputs: Arrays) -> None:
        kinds = self._cuda.runtime.cudaMemcpyKind
        key = (profile, tuple(dynamic.items()))
        try:
            for name, array in inputs.items():
                self._copy(self._buffers[name], array.ctypes.data, array.nbytes, kinds.cudaMemcpyHostToDevice)
            if key in self._graphs:
                self._cuda("cudaGraphLaunch", self._graphs[key][0], self._stream)
            else:
                self._prepare(self._eager, profile, dynamic)
                self._enqueue(self._eager)
            for name, array in outputs.items():
                self._copy(array.ctypes.data, self._buffers[name], array.nbytes, kinds.cudaMemcpyDeviceToHost)
            self._cuda("cudaStreamSynchronize", self._stream)
        except BackendError as error:
            with contextlib.suppress(BackendError):  # what was enqueued still reads and writes the caller's arrays
                self._cuda("cudaStreamSynchronize", self._stream)
            raise BackendError(f"{self.spec.name} failed on tensorrt: {error}") from error

    def _copy(self, target: int, source: int, size: int, kind: Any) -> None:
        self._cuda("cudaMemcpyAsync", target, source, size, kind, self._stream)

    def _new_context(self) -> _Context:
        context = self._engine.create_execution_context(self._trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if context is None:
            raise BackendError(f"{self.spec.name}: TensorRT makes no execution context: {self._logger.errors()}")
        # Engines keep details for the inspector, and would report every layer of every run to NVTX by them.
        context.nvtx_verbosity = self._trt.ProfilingVerbosity.NONE
        context.set_device_memory(self._activations, self.device_memory)
        for name, address in self._buffers.items():
            if not context.set_tensor_address(name, address):
                raise BackendError(f"{self.spec.name}: TensorRT refuses the buffer of {name}: {self._logger.errors()}")
        return _Context(context)

    def _prepare(self, ready: _Context, profile: int, dynamic: Mapping[str, int]) -> None:
        """Set profile and input shapes where they changed, and hold the output shapes against the spec."""
        shape, context = tuple(dynamic.items()), ready.context
        if (ready.profile, ready.shape) == (profile, shape):
            return
        ready.shape = ()  # unknown until all of it is set
        with refusals(f"TensorRT refuses {_describe(dynamic)} in profile {profile}", self._logger):
            if ready.profile != profile:
                context.set_optimization_profile_async(profile, int(self._stream))
                ready.profile = profile
            for tensor in self.spec.inputs:
                if not context.set_input_shape(tensor.name, tensor.shape(self._sizes, **dynamic)):
                    raise BackendError(f"TensorRT refuses {tensor.name} at {_describe(dynamic)}: {self._logger.errors()}")
            if missing := context.infer_shapes():
                raise BackendError(f"TensorRT cannot infer the shapes of the outputs, since {', '.join(missing)} is not set")
            shapes = {tensor.name: tuple(context.get_tensor_shape(tensor.name)) for tensor in self.spec.outputs}
        for tensor in self.spec.outputs:
            found, wanted = shapes[tensor.name], tensor.shape(self._sizes, **dynamic)
            if found != wanted:
                raise BundleError(f"{self.spec.name}.{tensor.name}: the engine gives shape {found}, its spec says {wanted}")
        ready.shape = shape

    def _enqueue(self, ready: _Context) -> None:
        if not ready.context.execute_async_v3(int(self._stream)):
            raise BackendError(f"execute_async_v3: {self._logger.errors()}")

    def _capture(self, profile: int, dynamic: Mapping[str, int], release: contextlib.ExitStack) -> None:
        """Record one shape, if CUDA lets it be recorded. A context of its own stays with it, since a graph must not outlive changes to its
        context."""
        ready = self._new_context()
        self._prepare(ready, profile, dynamic)
        # Once outside the capture: it makes the deferred changes of shape and profile, which cannot be recorded.
        self._enqueue(ready)
        self._cuda("cudaStreamSynchronize", self._stream)
        try:
            # Thread-local: what other threads allocate meanwhile (ONNX Runtime, another session) does not break the capture.
            self._cuda("cudaStreamBeginCapture", self._stream, self._cuda.runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
            recorded = ready.context.execute_async_v3(int(self._stream))
            graph = self._cuda("cudaStreamEndCapture", self._stream)
        except BackendError:  # no capture, or one that was invalidated: this engine cannot be recorded, and the stream is usable again
            return
        if recorded:
            with contextlib.suppress(BackendError):  # too little memory, say: the shape is enqueued like others
                executable = self._cuda("cudaGraphInstantiate", graph, 0)
                release.callback(self._cuda.release, "cudaGraphExecDestroy", executable)
                self._graphs[profile, ready.shape] = executable, ready
        self._cuda.release("cudaGraphDestroy", graph)

    def _largest(self, tensor: TensorSpec) -> int:
        """Bytes of `tensor` at the largest sizes of any profile."""
        shapes = (tensor.shape(self._sizes, **{axis: sizes.max for axis, sizes in profile.items()}) for profile in self._profiles)
        return max(prod(shape) for shape in shapes) * np.dtype(tensor.dtype).itemsize

    def _allocate(self, size: int, release: contextlib.ExitStack) -> int:
        """Zeroed device memory: the first enqueue reads inputs that nobody has written, and token ids must be valid."""
        try:
            address = int(self._cuda("cudaMalloc", max(size, 1)))
        except BackendError as error:
            raise BackendError(f"{self.spec.name}: the device has no {size / 2**20:.0f} MiB of memory left ({error})") from error
        release.callback(self._cuda.release, "cudaFree", address)
        self._cuda("cudaMemsetAsync", address, 0, max(size, 1), self._stream)
        return address


def _release(cuda: Cuda, device: int, held: contextlib.ExitStack) -> None:
    """On the session's device, whatever thread the last reference to it ends in. Nothing is left to do where even that is refused."""
    with contextlib.suppress(BackendError), cuda.on(device):
        held.close()


def _describe(dynamic: Mapping[str, int]) -> str:
    return ", ".join(f"{axis} {size}" for axis, size in dynamic.items())


def _buckets(profile: Mapping[str, AxisRange]) -> list[int]:
    """Lengths of texts that are worth a CUDA graph: the profile's optimum, its longest, and 8, 16, 32, ... between."""
    if (text := profile.get("text_length")) is None:
        return []
    doubled = takewhile(lambda size: size < text.max, (_SHORTEST_BUCKET << i for i in count()))
    return sorted({text.opt, text.max, *(size for size in doubled if size >= text.min)})


def _usual_sizes(profile: Mapping[str, AxisRange]) -> list[dict[str, int]]:
    """What is captured of one profile: its optimal batch, at each length of text that requests are padded to."""
    best = {axis: sizes.opt for axis, sizes in profile.items()}
    return [{**best, "text_length": size} for size in _buckets(profile)] or [best]


def _read_profile(engine: Any, spec: GraphSpec, index: int) -> dict[str, AxisRange]:
    """The dynamic axes of one profile, in the order in which `Binding` meets them."""
    ranges: dict[str, AxisRange] = {}
    for tensor in spec.inputs:
        least, opt, most = (tuple(dims) for dims in engine.get_tensor_profile_shape(tensor.name, index))
        for i, axis in enumerate(tensor.axes):
            if axis in DYNAMIC_AXES:
                ranges.setdefault(str(axis), AxisRange(min=least[i], opt=opt[i], max=most[i]))
    return ranges


def _check_tensors(trt: Any, engine: Any, spec: GraphSpec) -> None:
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    for kind, mode, tensors in (("input", trt.TensorIOMode.INPUT, spec.inputs), ("output", trt.TensorIOMode.OUTPUT, spec.outputs)):
        found = [name for name in names if engine.get_tensor_mode(name) == mode]
        if set(found) != {tensor.name for tensor in tensors}:
            raise BundleError(f"{spec.name}: the engine's {kind}s are {', '.join(found)}; build the engines again")
        for tensor in tensors:
            if (dtype := engine.get_tensor_dtype(tensor.name)) != getattr(trt.DataType, _DTYPES[tensor.dtype]):
                raise BundleError(f"{spec.name}.{tensor.name}: the engine has {dtype}, the manifest says {tensor.dtype}; build it again")


def _check_shapes(engine: Any, spec: GraphSpec, sizes: GraphSizes, profiles: Sequence[Mapping[str, AxisRange]]) -> None:
    """Hold the engine's shapes against the spec's, in which a dynamic axis is -1. An output's size that follows from a computation may be
    -1 too, and an axis that the profiles leave no choice (a batch of 1:1:1) may have that size: a run holds both against the spec."""
    fixed = {axis: only for axis in profiles[0] if (only := _only_size(profiles, axis)) is not None}
    for tensor in (*spec.inputs, *spec.outputs):
        wanted = tensor.shape(sizes, **dict.fromkeys(DYNAMIC_AXES, -1))
        narrow = tensor.shape(sizes, **{**dict.fromkeys(DYNAMIC_AXES, -1), **fixed})
        shape = tuple(engine.get_tensor_shape(tensor.name))
        open_ended = {-1} if tensor in spec.outputs else set()
        fits = [size in {a, b, *open_ended} for size, a, b in zip(shape, wanted, narrow, strict=False)]
        if len(shape) != len(wanted) or not all(fits):
            raise BundleError(f"{spec.name}.{tensor.name}: the engine has shape {shape}, expected {wanted}; build it again")


def _only_size(profiles: Sequence[Mapping[str, AxisRange]], axis: str) -> int | None:
    sizes = {size for profile in profiles for size in (profile[axis].min, profile[axis].max)}
    return sizes.pop() if len(sizes) == 1 else None
