"""`tensorrt` without TensorRT: plans hold the ONNX graph, and running one is ONNX Runtime between the fake device's buffers.

Return values and refusals follow the docstrings of the real bindings; `test_tensorrt_bindings.py` holds every public name
here against them.
"""

from __future__ import annotations

import ctypes
import enum
import json
import sys
import types
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from .fake_cuda import FakeCuda


class Faults:
    """What goes wrong: operators that the parser lacks, messages of a failing build, an error added to every output."""

    def __init__(self) -> None:
        self.unsupported: set[str] = {"MatMulInteger"}
        self.build = ""
        self.error = 0.0
        self.uncapturable = False
        self.enqueue = False
        self.network_flags: list[int] = []
        self.inspection: str | None = None  # what the inspector says instead
        self.inspection_missing = False  # or that it says nothing
        self.infer: list[str] | int = []  # names that shapes cannot be inferred for; less than 0: an error code
        self.refuse_cache = False
        self.log_lines = 0  # that a build logs
        self.fixed_batch_shapes = False  # the engine's shapes have the sizes that all profiles leave no choice


class Severity(enum.Enum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class ILogger:
    Severity = Severity

    def __init__(self) -> None:
        self.constructed = True


def _enum(name: str, *members: str) -> Any:
    return enum.IntEnum(name, {member: value for value, member in enumerate(members)})


class FakeTensorRT:
    """The module for one version on one fake device; `faults` may be changed at any time."""

    def __init__(self, cuda: FakeCuda, version: str = "11.4.0.106") -> None:
        self.cuda, self.version, self.faults = cuda, version, Faults()

    def install(self, patch: pytest.MonkeyPatch) -> FakeTensorRT:
        patch.setitem(sys.modules, "tensorrt", self.module())
        return self

    @property
    def capability(self) -> str:
        return "{}.{}".format(*self.cuda.capability)

    def module(self) -> Any:
        fake, faults, cuda = self, self.faults, self.cuda
        trt: Any = types.ModuleType("tensorrt")
        trt.__version__, trt.ILogger = self.version, ILogger
        old = self.version.startswith("10.")
        trt.NetworkDefinitionCreationFlag = _enum("NetworkDefinitionCreationFlag", *["EXPLICIT_BATCH"] * old, "STRONGLY_TYPED")
        trt.BuilderFlag = _enum("BuilderFlag", *["FP16", "BF16", "INT8"] * old, "TF32", "VERSION_COMPATIBLE")
        trt.MemoryPoolType = _enum("MemoryPoolType", "WORKSPACE")
        trt.HardwareCompatibilityLevel = _enum("HardwareCompatibilityLevel", "NONE", "AMPERE_PLUS")
        trt.ProfilingVerbosity = _enum("ProfilingVerbosity", "LAYER_NAMES_ONLY", "NONE", "DETAILED")
        trt.LayerInformationFormat = _enum("LayerInformationFormat", "ONELINE", "JSON")
        trt.TensorIOMode = _enum("TensorIOMode", "NONE", "INPUT", "OUTPUT")
        trt.DataType = _enum("DataType", "FLOAT", "HALF", "INT64")
        trt.ExecutionContextAllocationStrategy = _enum("ExecutionContextAllocationStrategy", "STATIC", "USER_MANAGED")
        trt.ErrorCode = _enum("ErrorCode", "SUCCESS", "MODEL_DESERIALIZE_FAILED", "UNSUPPORTED_NODE", "INVALID_NODE")
        kinds = {onnx.TensorProto.FLOAT: trt.DataType.FLOAT, onnx.TensorProto.INT64: trt.DataType.INT64}

        class ParserError:
            def __init__(self, code: Any, operator: str, name: str, text: str) -> None:
                self._values = code, operator, name, text

            def code(self) -> Any:
                return self._values[0]

            def node_operator(self) -> str:
                return self._values[1]

            def node_name(self) -> str:
                return self._values[2]

            def desc(self) -> str:
                return self._values[3]

        class OnnxParser:
            def __init__(self, network: Any, logger: ILogger) -> None:
                self._network, self._errors = network, []

            def parse_from_file(self, model: str) -> bool:
                try:
                    proto = onnx.load(model)
                except Exception as error:
                    self._errors.append(ParserError(trt.ErrorCode.MODEL_DESERIALIZE_FAILED, "", "", str(error)))
                    return False
                self._network._model = proto.SerializeToString()
                for node in proto.graph.node:
                    if node.op_type in faults.unsupported:
                        self._errors.append(ParserError(trt.ErrorCode.UNSUPPORTED_NODE, node.op_type, node.name, "no importer"))
                    if node.op_type == "Invalid":
                        self._errors.append(ParserError(trt.ErrorCode.INVALID_NODE, node.op_type, node.name, "assertion\nfailed"))
                return not self._errors

            @property
            def num_errors(self) -> int:
                return len(self._errors)

            def get_error(self, index: int) -> ParserError:
                return self._errors[index]

        class INetworkDefinition:
            _model = b""

        class IOptimizationProfile:
            def __init__(self) -> None:
                self._shapes: dict[str, list[tuple[int, ...]]] = {}

            def set_shape(self, input: str, min: tuple[int, ...], opt: tuple[int, ...], max: tuple[int, ...]) -> None:
                if not all(a <= b <= c for a, b, c in zip(min, opt, max, strict=True)):
                    raise ValueError("inconsistent")
                self._shapes[input] = [min, opt, max]

        class ITimingCache:
            def __init__(self, raw: bytes) -> None:
                self._raw = raw

            def serialize(self) -> bytes:
                return fake.cache()

        class IBuilderConfig:
            builder_optimization_level, profiling_verbosity, hardware_compatibility_level = 3, 0, 0

            def __init__(self) -> None:
                self._flags = {trt.BuilderFlag.TF32}  # on by default
                self._profiles: list[Any] = []
                self._workspace, self._cache = None, None

            def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
                self._profiles.append(profile._shapes)
                return len(self._profiles) - 1

            def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
                self._workspace = pool_size

            def set_flag(self, flag: Any) -> None:
                self._flags.add(flag)

            def clear_flag(self, flag: Any) -> None:
                self._flags.discard(flag)

            def create_timing_cache(self, serialized_timing_cache: bytes) -> Any:
                return ITimingCache(serialized_timing_cache)

            def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
                if faults.refuse_cache and cache._raw:
                    return False
                if cache._raw not in (b"", fake.cache()) and not ignore_mismatch:
                    return False
                self._cache = cache
                return True

            def get_timing_cache(self) -> Any:
                return None if self.builder_optimization_level == 0 else self._cache

        class Builder:
            def __init__(self, logger: ILogger) -> None:
                assert logger.constructed
                self._logger: Any = logger

            def create_network(self, flags: int = 0) -> INetworkDefinition:
                faults.network_flags.append(flags)
                return INetworkDefinition()

            def create_builder_config(self) -> IBuilderConfig:
                return IBuilderConfig()

            def create_optimization_profile(self) -> IOptimizationProfile:
                return IOptimizationProfile()

            def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> Any:
                self._logger.log(Severity.INFO, "building")
                self._logger.log(Severity.VERBOSE, "chatter")
                for n in range(faults.log_lines):
                    self._logger.log(Severity.INFO, f"line {n}")
                if faults.build:
                    self._logger.log(Severity.ERROR, faults.build)
                    return None
                vc, hc = trt.BuilderFlag.VERSION_COMPATIBLE in config._flags, config.hardware_compatibility_level == 1
                tf32, level = trt.BuilderFlag.TF32 in config._flags, config.builder_optimization_level
                return fake.plan(network._model, config._profiles, vc=vc, hc=hc, tf32=tf32, level=level, workspace=config._workspace)

        class Runtime:
            engine_host_code_allowed = False

            def __init__(self, logger: ILogger) -> None:
                assert cuda.devices, "a Runtime without a device crashes the process"
                self._logger: Any = logger

            def deserialize_cuda_engine(self, serialized_engine: bytes) -> Any:
                header, _, model = serialized_engine.partition(b"\n")
                plan = json.loads(header) if header.startswith(b"{") else {"version": "?", "capability": "?", "vc": False, "hc": False}
                if plan["version"] != fake.version and not (plan["vc"] and self.engine_host_code_allowed):
                    self._logger.log(Severity.ERROR, f"expecting library version {fake.version} got {plan['version']}")
                    return None
                if plan["capability"] != fake.capability and not plan["hc"]:
                    self._logger.log(Severity.ERROR, f"expecting compute {fake.capability} got compute {plan['capability']}")
                    return None
                return ICudaEngine(plan, model, self._logger)

        class EngineInspector:
            def __init__(self, model: Any) -> None:
                self._model = model

            def get_engine_information(self, format: Any) -> str | None:
                if faults.inspection_missing or faults.inspection is not None:
                    return faults.inspection
                return json.dumps({"Layers": [{"Name": node.name, "LayerType": node.op_type} for node in self._model.graph.node]})

        class ICudaEngine:
            device_memory_size_v2 = 512

            def __init__(self, plan: Any, model: bytes, logger: Any) -> None:
                self._plan, self._logger, self._model = plan, logger, onnx.load_from_string(model)
                self._session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
                graph = self._model.graph
                self._tensors = {value.name: value for value in (*graph.input, *graph.output)}
                self._inputs = [value.name for value in graph.input]

            num_layers = property(lambda self: len(self._model.graph.node))
            num_io_tensors = property(lambda self: len(self._tensors))
            num_optimization_profiles = property(lambda self: len(self._plan["profiles"]))

            def get_tensor_name(self, index: int) -> str:
                return list(self._tensors)[index]

            def get_tensor_mode(self, name: str) -> Any:
                return trt.TensorIOMode.INPUT if name in self._inputs else trt.TensorIOMode.OUTPUT

            def get_tensor_dtype(self, name: str) -> Any:
                return kinds[self._tensors[name].type.tensor_type.elem_type]

            def get_tensor_shape(self, name: str) -> tuple[int, ...]:
                dims = self._tensors[name].type.tensor_type.shape.dim
                return tuple(self._only_size(d.dim_param) if d.dim_param else d.dim_value for d in dims)

            def _only_size(self, axis: str) -> int:
                sizes = set()
                for name in self._inputs if faults.fixed_batch_shapes else ():
                    for at, dim in enumerate(self._tensors[name].type.tensor_type.shape.dim):
                        if dim.dim_param == axis:
                            sizes |= {shape[at] for profile in self._plan["profiles"] for shape in profile[name]}
                return sizes.pop() if len(sizes) == 1 else -1

            def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Any]:
                return [tuple(shape) for shape in self._plan["profiles"][profile_index][name]]

            def create_engine_inspector(self) -> EngineInspector:
                return EngineInspector(self._model)

            def create_execution_context(self, strategy: Any) -> IExecutionContext:
                assert strategy == trt.ExecutionContextAllocationStrategy.USER_MANAGED
                return IExecutionContext(self)

        class IExecutionContext:
            def __init__(self, engine: ICudaEngine) -> None:
                self._engine, self._profile = engine, -1
                self._shapes: dict[str, tuple[int, ...]] = {}
                self._addresses: dict[str, int] = {}
                self._memory, self._settled, self._changes = 0, False, 0
                self.nvtx_verbosity = trt.ProfilingVerbosity.DETAILED  # the engine's

            def _changed(self) -> None:
                self._settled, self._changes = False, self._changes + 1

            def set_device_memory(self, memory: int, size: int) -> None:
                assert cuda.owns(memory, size)
                assert size >= self._engine.device_memory_size_v2
                self._memory = memory

            def set_tensor_address(self, name: str, memory: int) -> bool:
                self._addresses[name] = memory
                return True

            def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
                self._profile, self._shapes = profile_index, {}
                self._changed()
                return 0 <= profile_index < self._engine.num_optimization_profiles

            def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
                least, _, most = self._engine.get_tensor_profile_shape(name, self._profile)
                if not all(a <= b <= c for a, b, c in zip(least, shape, most, strict=True)):
                    return False
                self._shapes[name] = shape
                self._changed()
                return True

            def infer_shapes(self) -> list[str]:
                if isinstance(faults.infer, int):
                    raise RuntimeError(f"infer_shapes error code: {faults.infer}")
                if faults.infer:
                    return faults.infer
                return [name for name in self._engine._inputs if name not in self._shapes]

            def get_tensor_shape(self, name: str) -> tuple[int, ...]:
                dims = {}
                for given, shape in self._shapes.items():
                    for dim, size in zip(self._engine._tensors[given].type.tensor_type.shape.dim, shape, strict=True):
                        dims[dim.dim_param] = size
                return tuple(
                    dims[d.dim_param] if d.dim_param else d.dim_value for d in self._engine._tensors[name].type.tensor_type.shape.dim
                )

            def execute_async_v3(self, stream_handle: int) -> bool:
                shapes = {name: self.get_tensor_shape(name) for name in self._engine._tensors}
                ready = self._memory and all(
                    cuda.owns(self._addresses[n], prod(s) * 4 * (1 + (self._engine.get_tensor_dtype(n) == trt.DataType.INT64)))
                    for n, s in shapes.items()
                )
                if not ready or faults.enqueue:
                    self._engine._logger.log(Severity.ERROR, "IExecutionContext::enqueueV3: Error Code 3: API Usage Error")
                    return False
                if cuda.capturing and (not self._settled or faults.uncapturable):
                    cuda.invalidated = True  # deferred updates cannot be recorded
                self._settled, changes = True, self._changes
                cuda.submit(stream_handle, lambda: self._compute(shapes, changes))
                return True

            def _compute(self, shapes: dict[str, tuple[int, ...]], changes: int) -> None:
                engine = self._engine
                given = {n: _view(self._addresses[n], shapes[n], engine.get_tensor_dtype(n) == trt.DataType.INT64) for n in engine._inputs}
                outputs = [name for name in engine._tensors if name not in engine._inputs]
                for name, value in zip(outputs, engine._session.run(outputs, given), strict=True):
                    # A graph whose context was changed since does anything at all.
                    result = value + faults.error if changes == self._changes else np.full_like(value, np.nan)
                    _view(self._addresses[name], shapes[name], False)[...] = result

        for kind in (ParserError, OnnxParser, INetworkDefinition, IOptimizationProfile, ITimingCache, IBuilderConfig, Builder,
                     Runtime, EngineInspector, ICudaEngine, IExecutionContext):  # fmt: skip
            setattr(trt, kind.__name__, kind)
        return trt

    def cache(self) -> bytes:
        return f"timings of {self.version} on {self.capability}".encode()

    def plan(self, model: bytes | Path, profiles: list[Any], *, vc: bool = False, hc: bool = False, **settings: Any) -> bytes:
        """What the builder gives. `profiles`: per profile, min, opt and max of every input by name."""
        raw = model.read_bytes() if isinstance(model, Path) else model
        header = {"version": self.version, "capability": self.capability, "vc": vc, "hc": hc, "profiles": profiles, **settings}
        return json.dumps(header).encode() + b"\n" + raw


def _view(address: int, shape: tuple[int, ...], integers: bool) -> np.ndarray:
    kind = ctypes.c_int64 if integers else ctypes.c_float
    return np.ctypeslib.as_array((kind * prod(shape)).from_address(address)).reshape(shape)
