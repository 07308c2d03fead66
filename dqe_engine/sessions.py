"""Graphs that run: one session per graph, bound to its spec by name, dtype and shape, on the provider that was asked for."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Protocol, cast, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from .binding import Arrays, Binding
from .contracts.graphs import GraphSizes, GraphSpec, TensorSpec
from .device_arrays import CUDA_DEVICE, ForeignArray
from .device_tokens import DEVICE_NAMES, Tokens, place_name
from .errors import BackendError, BundleError, InputError, one_line
from .forks import ProcessBound, guard_children
from .processors import available_cpus, cores
from .tensorrt.onnx_runtime import without_profiles
from .tensorrt.sizes import ANY_BATCH

OrtProvider = Literal["auto", "cpu", "cuda", "ort-tensorrt"]
Provider = Literal[OrtProvider, "tensorrt"]
"""What runs a graph: "tensorrt" is our session on the bundle's own engines, the others are ONNX Runtime's."""
PROVIDERS: tuple[Provider, ...] = ("auto", "cpu", "cuda", "tensorrt", "ort-tensorrt")
LITTLE_WORK = 256 << 20
"""Batch times image tokens times bytes of a graph and its weights, up to which a second thread is not woken: it would save less than
what the system at times takes to let it run (a tick of 4 ms, at the 95th percentile). A bound on multiply-adds, if weights have 8 bits.

A graph of which this holds at least one row has too little in each operator to share, so larger batches are split among threads."""

_PROVIDER_NAMES: Mapping[str, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "ort-tensorrt": "TensorrtExecutionProvider",
}
_ORDERS: Mapping[str, tuple[str, ...]] = {"cpu": ("cpu",), "cuda": ("cuda", "cpu"), "ort-tensorrt": ("ort-tensorrt", "cuda", "cpu")}
"""Each provider and those that take the nodes it has no kernel for, such as the computation of shapes."""
_FLOAT32 = {"use_tf32": "0"}
"""TF32, ONNX Runtime's default, leaves float32's tolerance: errors of 5e-5 to 8e-4 on an H100. Speed is what float16 bundles are for."""
_SLOWER_FUSIONS = ["SkipLayerNormFusion"]
"""On the CPU: the fused kernel works number by number, an addition and `LayerNormalization` do not (decision 78)."""
_ORT_TYPES = {"float32": "tensor(float)", "int64": "tensor(int64)"}


class GraphSession(Protocol):
    """What the engine needs of a graph, whichever runtime executes it. Threads may share one session."""

    @property
    def spec(self) -> GraphSpec: ...

    @property
    def provider(self) -> str:
        """What actually runs the graph, such as "cpu" or "cuda"; never "auto"."""
        ...

    def run(self, **inputs: NDArray[Any]) -> Arrays:
        """Every output by name, for all inputs by name. Raises InputError for arrays that do not fit the spec."""
        ...


@runtime_checkable
class TextBuckets(Protocol):
    """What a session has besides where some lengths of text run faster than those between."""

    @property
    def text_buckets(self) -> tuple[int, ...]:
        """Those lengths in tokens, ascending; texts are best padded to the next one, which `attention_mask` hides."""
        ...


@runtime_checkable
class Resident(Protocol):
    """What a session has besides whose outputs can stay on its device, for the next graph there."""

    @property
    def device(self) -> tuple[int, int] | None:
        """DLPack's type and number of the device; None where arrays are NumPy's."""
        ...

    def run_keeping(self, keep: Collection[str], /, **inputs: Tokens) -> dict[str, Tokens]:
        """`GraphSession.run`, of which the outputs named in `keep` stay on the device. Inputs may lie there, too."""
        ...


def common_device(*sessions: GraphSession) -> tuple[int, int] | None:
    """The device on which all these sessions run and can leave their outputs; None where there is no such device."""
    devices = {session.device if isinstance(session, Resident) else None for session in sessions}
    return devices.pop() if len(devices) == 1 else None


def text_buckets(*sessions: GraphSession) -> tuple[int, ...]:
    """Lengths to pad texts to that go through all these sessions: the first's that has any, none for ONNX Runtime's."""
    return next((session.text_buckets for session in sessions if isinstance(session, TextBuckets) and session.text_buckets), ())


class OnnxSession(ProcessBound):
    """An ONNX Runtime session bound to `spec`.

    `provider`: all but "auto" are binding, a session that ONNX Runtime placed elsewhere is a BackendError; "auto"
    takes CUDA where it works, else the CPU, and `self.provider` says which. `tensorrt`: of `provider_options`, for "ort-tensorrt", which
    without them builds its engines anew in every process and at each new shape; with them larger batches run in parts.
    `threads`: CPU threads of a call at most, None for all processors. One where there is little to do (`LITTLE_WORK`); of a larger batch,
    each thread runs a part, and of a graph where one row is not little, the threads share each operator.
    `device`: where `run_keeping` leaves outputs: on CUDA's provider, with all of a call in one part.
    Raises BundleError when the file is no graph or not the spec's graph.
    """

    def __init__(
        self,
        path: Path,
        spec: GraphSpec,
        sizes: GraphSizes,
        *,
        provider: OrtProvider = "auto",
        threads: int | None = None,
        tensorrt: Mapping[str, str] | None = None,
    ) -> None:
        if provider not in ("auto", *_ORDERS):
            raise InputError(f"unknown provider {provider!r}; choose auto, {', '.join(_ORDERS)}")
        if threads is not None and threads < 1:
            raise InputError(f"threads must be at least 1, got {threads}")
        self.spec = spec
        self._binding = Binding(spec, sizes)
        weights = (path, path.with_name(f"{path.name}.data"))
        size = sum(file.stat().st_size for file in weights if file.exists())
        self._little = LITTLE_WORK // max(1, size * sizes.image_tokens) if provider in ("auto", "cpu") else 0
        self._session, self.provider = _open_session(path, provider, 1 if self._little else threads, tensorrt or {})
        if self.provider != "cpu":  # "auto" found a GPU
            self._little = 0
        self.device = (CUDA_DEVICE, 0) if self.provider == "cuda" else None
        self._largest = ANY_BATCH.max if tensorrt else None
        _check_bound(path, "input", spec.inputs, self._session.get_inputs(), sizes)
        _check_bound(path, "output", spec.outputs, self._session.get_outputs(), sizes)
        self._threads = (threads or available_cpus()) if self._little else 1
        self._helpers = ThreadPoolExecutor(self._threads - 1, "dqe-graph") if self._threads > 1 else None
        self.bind_to_process()

    def run(self, **inputs: Tokens) -> Arrays:
        """See `GraphSession.run`. An empty batch gives empty outputs without touching ONNX Runtime.

        Raises BackendError when the runtime fails (out of memory, device lost), and in a child of the process that made the session.
        """
        return cast(Arrays, self.run_keeping((), **inputs))  # nothing is kept

    def run_keeping(self, keep: Collection[str], /, **inputs: Tokens) -> dict[str, Tokens]:
        """See `Resident.run_keeping`, and `run` for errors."""
        self.check_process()
        dynamic = self._binding.dynamic_sizes(inputs)
        shapes = self._binding.output_shapes(dynamic)
        for name, value in inputs.items():
            if isinstance(value, ForeignArray) and value.device != self.device:
                here = "takes NumPy arrays" if self.device is None else f"runs on {place_name(self.device)}"
                raise InputError(
                    f"{self.spec.name}.{name}: on {place_name(value.device)}, and this graph {here}; open all graphs on one provider"
                )
        if dynamic["batch"] == 0:
            return {tensor.name: np.empty(shapes[tensor.name], tensor.dtype) for tensor in self.spec.outputs}
        arrays = {name: value if isinstance(value, ForeignArray) else np.ascontiguousarray(value) for name, value in inputs.items()}
        try:
            values: Sequence[Tokens]
            if self.device is not None:
                values = self._run_on_device(keep, shapes, arrays, self.device)
            else:  # all are NumPy's
                values = self._run_parts(list(shapes), cast(Arrays, arrays), self._parts(dynamic["batch"]))
        except Exception as error:  # ONNX Runtime's exceptions share no base class but Exception
            raise BackendError(f"{self.spec.name} failed on {self.provider}: {one_line(error)}") from error
        outputs = dict(zip(shapes, values, strict=True))
        for name, array in outputs.items():
            if array.shape != shapes[name]:
                raise BundleError(f"{self.spec.name}.{name}: the graph gave shape {array.shape}, expected {shapes[name]}; export again")
        return outputs

    def _run_on_device(
        self, keep: Collection[str], names: Collection[str], inputs: Mapping[str, Tokens], device: tuple[int, int]
    ) -> list[Tokens]:
        """The outputs of these names. ONNX Runtime brings what is not kept to the host, and returns when its stream has done all."""
        kind, number = DEVICE_NAMES[device[0]], device[1]
        binding = self._session.io_binding()
        for name, value in inputs.items():
            if isinstance(value, ForeignArray):
                binding.bind_input(name, kind, number, value.dtype.type, value.shape, value.address)
            else:
                binding.bind_cpu_input(name, value)
        for name in names:
            binding.bind_output(name, *((kind, number) if name in keep else ("cpu", 0)))
        self._session.run_with_iobinding(binding)
        found: list[Tokens] = []
        for tensor, value in zip(self.spec.outputs, binding.get_outputs(), strict=True):
            if tensor.name in keep:
                owner = self._session, value  # the memory is the session's
                found.append(ForeignArray(value.data_ptr(), tuple(value.shape()), np.dtype(tensor.dtype), device, owner=owner))
            else:
                found.append(value.numpy())
        return found

    def _parts(self, batch: int) -> int:
        """Into how many calls to split a batch: on the CPU among threads, for TensorRT by what an engine takes."""
        if self._largest is not None:
            return -(-batch // self._largest)
        return max(1, min(self._threads, batch // self._little)) if self._little else 1

    def _run_parts(self, names: list[str], inputs: Arrays, count: int) -> Sequence[NDArray[Any]]:
        """The outputs of these names. Helpers run parts meanwhile; those that none has begun the caller runs itself, waiting for nobody."""
        run = self._session.run
        if count == 1:
            return run(names, inputs)  # type: ignore[no-any-return]
        split = {name: np.array_split(array, count) for name, array in inputs.items()}
        parts = [{name: arrays[i] for name, arrays in split.items()} for i in range(count)]
        given = [self._offer(names, part) for part in parts[1:]]
        values = [run(names, parts[0])]
        for part, future in zip(parts[1:], given, strict=True):
            values.append(run(names, part) if future is None or future.cancel() else future.result())
        return [np.concatenate(arrays) for arrays in zip(*values, strict=True)]

    def _offer(self, names: list[str], part: Arrays) -> Future[Sequence[NDArray[Any]]] | None:
        if self._helpers is None:
            return None
        try:
            return self._helpers.submit(self._session.run, names, part)
        except RuntimeError:  # no thread to be had, or the interpreter is about to end
            return None


def _open_session(
    path: Path, provider: OrtProvider, threads: int | None, tensorrt: Mapping[str, str] = MappingProxyType({})
) -> tuple[Any, str]:
    ort = _import_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors only: what matters is checked below and raised
    if threads is None and available_cpus() < cores():
        threads = available_cpus()  # ONNX Runtime knows of affinity, and not of a container's quota
    if threads is not None:
        options.intra_op_num_threads = threads
    # Idle workers would spin for a while and take the cores from the search, which comes next (decision 13).
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")  # versions without it do not mind
    available = ort.get_available_providers()
    best = "cuda" if _PROVIDER_NAMES["cuda"] in available else "cpu"
    wanted = best if provider == "auto" else provider
    if _PROVIDER_NAMES[wanted] not in available:
        raise BackendError(
            f"provider {wanted!r}: the installed onnxruntime has only {', '.join(available)}; install onnxruntime-gpu instead"
        )
    if wanted == "cpu":
        # Graphs with fixed 8-bit scales, which are TensorRT's, multiply in float32: the fused kernels overflow on processors without VNNI.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    names = [_PROVIDER_NAMES[name] for name in _ORDERS[wanted] if _PROVIDER_NAMES[name] in available]

    def create(tensorrt: Mapping[str, str]) -> Any:
        settings = {_PROVIDER_NAMES["cuda"]: _FLOAT32, _PROVIDER_NAMES["ort-tensorrt"]: dict(tensorrt)}
        # Without enable_fallback=0 a failing provider is replaced by the CPU, at creation and in the middle of run().
        return ort.InferenceSession(
            str(path), options, providers=names, provider_options=[settings.get(name, {}) for name in names], enable_fallback=0,
            disabled_optimizers=_SLOWER_FUSIONS if wanted == "cpu" else None,
        )  # fmt: skip

    try:
        try:
            session = create(tensorrt)
        except Exception:  # as in OnnxSession.run
            if without_profiles(tensorrt) == tensorrt:
                raise
            session = create(without_profiles(tensorrt))
    except Exception as error:  # as in OnnxSession.run
        if wanted != "cpu":
            if provider == "auto":
                return _open_session(path, "cpu", threads)
            raise BackendError(
                f"{path.name} cannot run on {wanted}, choose another provider or mend its libraries: {one_line(error)}"
            ) from error
        raise BundleError(f"{path}: ONNX Runtime cannot load it, so export it again: {one_line(error)}") from error
    first = session.get_providers()[0]
    ran = next((short for short, name in _PROVIDER_NAMES.items() if name == first), first)
    if provider != "auto" and ran != provider:
        raise BackendError(f"{path.name}: asked for {provider}, ONNX Runtime chose {first}; check the CUDA libraries, or use 'cpu'")
    if ran != "cpu" and not _has_nodes(session, first):
        if provider == "auto":
            return _open_session(path, "cpu", threads)
        raise BackendError(f"{path.name}: ONNX Runtime opened {first} and gave it no node of the graph; use another provider")
    return session, ran


def _has_nodes(session: Any, provider: str) -> bool:
    """Whether any node runs on `provider`: one that is merely listed first may have none. True where ONNX Runtime cannot say."""
    if not hasattr(session, "get_provider_graph_assignment_info"):  # older versions
        return True
    return any(part.ep_name == provider for part in session.get_provider_graph_assignment_info())


def _import_onnxruntime() -> Any:
    remedy = "install exactly one of onnxruntime and onnxruntime-gpu (they overwrite each other: uninstall both, then install one)"
    guard_children()
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError(f"onnxruntime cannot be imported ({one_line(error)}); {remedy}") from error
    if not hasattr(onnxruntime, "InferenceSession"):  # what an uninstalled twin leaves behind is an empty namespace package
        raise BackendError(f"onnxruntime is installed but broken; {remedy}")
    return onnxruntime


def _check_bound(path: Path, kind: str, tensors: tuple[TensorSpec, ...], found: list[Any], sizes: GraphSizes) -> None:
    by_name = {argument.name: argument for argument in found}
    expected = [tensor.name for tensor in tensors]
    if by_name.keys() != set(expected):
        raise BundleError(f"{path}: {kind}s are {', '.join(by_name)}, the manifest says {', '.join(expected)}; export again")
    for tensor in tensors:
        argument = by_name[tensor.name]
        if argument.type != _ORT_TYPES[tensor.dtype]:
            raise BundleError(f"{path}: {kind} {tensor.name} is {argument.type}, the manifest says {tensor.dtype}; export again")
        if len(argument.shape) != len(tensor.axes):
            raise BundleError(
                f"{path}: {kind} {tensor.name} has {len(argument.shape)} axes, the manifest says {len(tensor.axes)}; export again"
            )
        for axis, wanted, size in zip(tensor.axes, tensor.sized(sizes), argument.shape, strict=True):
            if isinstance(size, int) and size != wanted:  # a dynamic axis equals no size: it must be symbolic
                raise BundleError(f"{path}: {kind} {tensor.name}: axis {axis!r} is fixed at {size}, expected {wanted}; export again")
