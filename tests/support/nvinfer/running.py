"""The runtime's side: an engine reads the graph out of its plan, and a context has ONNX Runtime compute it when the stream gets there."""

from __future__ import annotations

import ctypes
import json
from math import prod
from typing import Any

import numpy as np
import onnx
import onnxruntime

from .abi import Shape
from .base import TensorRTObject

MIN_OPT_MAX = range(3)
_NUMPY = {"FLOAT": np.float32, "HALF": np.float16, "INT32": np.int32, "INT64": np.int64}
_DATA_TYPES = {
    onnx.TensorProto.FLOAT: "FLOAT", onnx.TensorProto.FLOAT16: "HALF", onnx.TensorProto.INT32: "INT32", onnx.TensorProto.INT64: "INT64",
}  # fmt: skip


class Runtime(TensorRTObject):
    kind = "IRuntime"
    host_code = False

    def setEngineHostCodeAllowed(self, allowed: bool) -> None:
        self.host_code = allowed

    def getEngineHostCodeAllowed(self) -> bool:
        return self.host_code

    def deserializeCudaEngine(self, blob: int, size: int) -> int:
        header, _, model = ctypes.string_at(blob, size).partition(b"\n")
        plan = json.loads(header) if header.startswith(b"{") else {"version": "?", "capability": "?", "vc": False, "hc": False}
        if plan["version"] != self.fake.version and not (plan["vc"] and self.host_code):
            return self.refuse(f"expecting library version {self.fake.version} got {plan['version']}")
        if plan["capability"] != self.fake.capability and not plan["hc"]:
            return self.refuse(f"expecting compute {self.fake.capability} got compute {plan['capability']}")
        return CudaEngine(self, plan, model).address


class CudaEngine(TensorRTObject):
    kind = "ICudaEngine"

    def __init__(self, runtime: Runtime, plan: dict[str, Any], model: bytes) -> None:
        super().__init__(runtime.fake, runtime.logger)
        self.runtime = runtime
        self.profiles, self.model, self._plan = plan["profiles"], onnx.load_from_string(model), plan
        self.session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        self.inputs = [value.name for value in self.model.graph.input]
        self.tensors = {value.name: value.type.tensor_type for value in (*self.model.graph.input, *self.model.graph.output)}
        self.outputs = [name for name in self.tensors if name not in self.inputs]
        self._names = [self.keep(name) for name in self.tensors]

    @property
    def verbosity(self) -> int:
        return int(self._plan.get("verbosity", self.trt.ProfilingVerbosity.DETAILED))

    def dtype(self, name: str) -> np.dtype:
        return np.dtype(_NUMPY[_DATA_TYPES[self.tensors[name].elem_type]])

    def shape(self, name: str, sizes: dict[str, int]) -> tuple[int, ...]:
        """-1 for an axis whose size is not among `sizes`."""
        return tuple(sizes.get(d.dim_param, -1) if d.dim_param else d.dim_value for d in self.tensors[name].shape.dim)

    def sizes(self, shapes: dict[str, Any]) -> dict[str, int]:
        """The named axes at these shapes of inputs."""
        return {
            dim.dim_param: size
            for name, shape in shapes.items()
            for dim, size in zip(self.tensors[name].shape.dim, shape, strict=True)
            if dim.dim_param
        }

    def getNbLayers(self) -> int:
        return len(self.model.graph.node)

    def getNbIOTensors(self) -> int:
        return len(self.tensors)

    def getIOTensorName(self, index: int) -> int | None:
        return self._names[index] if 0 <= index < len(self._names) else None

    def getNbOptimizationProfiles(self) -> int:
        return max(1, len(self.profiles))

    def getProfilingVerbosity(self) -> int:
        return self.verbosity

    def getHardwareCompatibilityLevel(self) -> int:
        return int(self._plan["hc"])

    def getDeviceMemorySizeV2(self) -> int:
        return 512

    def getTensorIOMode(self, name: bytes) -> int:
        modes = self.trt.TensorIOMode
        text = name.decode()
        return int(modes.INPUT if text in self.inputs else modes.OUTPUT if text in self.tensors else modes.NONE)

    def getTensorDataType(self, name: bytes) -> int:
        return int(getattr(self.trt.DataType, _DATA_TYPES[self.tensors[name.decode()].elem_type]))

    def getTensorShape(self, name: bytes) -> tuple[int, ...] | None:
        if name.decode() not in self.tensors:
            return None
        ends = [self.sizes({n: shapes[which] for n, shapes in profile.items()}) for profile in self.profiles for which in (0, 2)]
        pinned = {axis: size for axis, size in (ends[0] if ends else {}).items() if all(end[axis] == size for end in ends)}
        return self.shape(name.decode(), pinned if self.faults.fixed_batch_shapes else {})

    def getProfileShape(self, name: bytes, profile: int, which: int) -> tuple[int, ...] | None:
        if not 0 <= profile < len(self.profiles) or name.decode() not in self.inputs:
            return None
        return tuple(self.profiles[profile][name.decode()][which])

    def createEngineInspector(self) -> int:
        return EngineInspector(self).address

    def createExecutionContext(self, strategy: int) -> int:
        assert strategy == int(self.trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        return self.refuse("Error Code 2: OutOfMemory (no context)") if self.faults.no_context else ExecutionContext(self).address


class EngineInspector(TensorRTObject):
    kind = "IEngineInspector"

    def __init__(self, engine: CudaEngine) -> None:
        super().__init__(engine.fake)
        self.engine = engine

    def getEngineInformation(self, format: int) -> int:
        assert format == int(self.trt.LayerInformationFormat.JSON)
        if self.faults.inspection_missing:
            return 0
        verbosity, nodes = self.trt.ProfilingVerbosity, self.engine.model.graph.node
        layers: list[Any] = [{"Name": node.name, "LayerType": node.op_type} for node in nodes]
        if self.engine.verbosity != int(verbosity.DETAILED):
            layers = [node.name for node in nodes] if self.engine.verbosity == int(verbosity.LAYER_NAMES_ONLY) else []
        return self.keep(json.dumps({"Layers": layers}) if self.faults.inspection is None else self.faults.inspection)


class ExecutionContext(TensorRTObject):
    kind = "IExecutionContext"

    def __init__(self, engine: CudaEngine) -> None:
        super().__init__(engine.fake, engine.logger)
        self.engine, self.cuda, self.nvtx = engine, engine.fake.cuda, engine.verbosity
        self._profile = 0
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._memory, self._settled, self._changes = 0, False, 0

    def _changed(self) -> None:
        self._settled, self._changes = False, self._changes + 1

    def getEngine(self) -> int:
        return self.engine.address

    def setDeviceMemoryV2(self, memory: int, size: int) -> None:
        assert self.cuda.owns(memory, size)
        assert size >= self.engine.getDeviceMemorySizeV2()
        self._memory = memory

    def setTensorAddress(self, name: bytes, memory: int) -> bool:
        self._addresses[name.decode()] = memory
        return name.decode() in self.engine.tensors

    def setNvtxVerbosity(self, verbosity: int) -> bool:
        level = (self.trt.ProfilingVerbosity.NONE, self.trt.ProfilingVerbosity.LAYER_NAMES_ONLY, self.trt.ProfilingVerbosity.DETAILED)
        rank = [int(member) for member in level]
        if rank.index(verbosity) > rank.index(self.engine.verbosity):
            return False
        self.nvtx = verbosity
        return True

    def getNvtxVerbosity(self) -> int:
        return self.nvtx

    def setOptimizationProfileAsync(self, profile: int, stream: int) -> bool:
        assert stream in self.cuda.streams
        if self.faults.profile or not 0 <= profile < self.engine.getNbOptimizationProfiles():
            return bool(self.refuse("IExecutionContext::setOptimizationProfileAsync: Error Code 3: API Usage Error"))
        self._profile, self._shapes = profile, {}
        self._changed()
        return True

    def setInputShape(self, name: bytes, shape: int) -> bool:
        wanted, limits = Shape.from_address(shape).tuple(), [self.engine.getProfileShape(name, self._profile, w) for w in MIN_OPT_MAX]
        if None in limits or any(len(limit or ()) != len(wanted) for limit in limits):
            return bool(self.refuse("IExecutionContext::setInputShape: Error Code 3: API Usage Error"))
        least, _, most = (limit or () for limit in limits)
        if not all(a <= b <= c for a, b, c in zip(least, wanted, most, strict=True)):
            return bool(self.refuse("IExecutionContext::setInputShape: Error Code 3: API Usage Error (not within the profile)"))
        self._shapes[name.decode()] = wanted
        self._changed()
        return True

    def inferShapes(self, most: int, names: int) -> int:
        found = self.faults.infer or [name for name in self.engine.inputs if name not in self._shapes]
        if isinstance(found, int):
            return found
        places = (ctypes.c_void_p * most).from_address(names)
        for index, name in enumerate(found[:most]):
            places[index] = self.keep(name)
        return len(found)

    def getTensorShape(self, name: bytes) -> tuple[int, ...] | None:
        return self.engine.shape(name.decode(), self.engine.sizes(self._shapes)) if name.decode() in self.engine.tensors else None

    def enqueueV3(self, stream: int) -> bool:
        shapes = {name: self.engine.shape(name, self.engine.sizes(self._shapes)) for name in self.engine.tensors}
        ready = self._memory and all(
            min(shape) >= 0 and self.cuda.owns(self._addresses[name], prod(shape) * self.engine.dtype(name).itemsize)
            for name, shape in shapes.items()
        )
        if not ready or self.faults.enqueue:
            return bool(self.refuse("IExecutionContext::enqueueV3: Error Code 3: API Usage Error"))
        if self.cuda.capturing and (not self._settled or self.faults.uncapturable):
            self.cuda.invalidated = True  # deferred updates cannot be recorded
        self._settled, changes = True, self._changes
        self.cuda.submit(stream, lambda: self._compute(shapes, changes))
        return True

    def _compute(self, shapes: dict[str, tuple[int, ...]], changes: int) -> None:
        engine = self.engine
        assert self.alive, "work of a context that was deleted"
        assert engine.alive, "work of an engine that was deleted"
        assert engine.runtime.alive, "work of an engine whose runtime was deleted"
        given = {name: self._view(name, shapes[name]) for name in engine.inputs}
        for name, value in zip(engine.outputs, engine.session.run(engine.outputs, given), strict=True):
            # A graph whose context was changed since does anything at all.
            result = value + value.dtype.type(self.faults.error) if changes == self._changes else np.full_like(value, np.nan)
            self._view(name, shapes[name])[...] = result

    def _view(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        dtype = self.engine.dtype(name)
        block = (ctypes.c_byte * (prod(shape) * dtype.itemsize)).from_address(self._addresses[name])
        return np.frombuffer(block, dtype).reshape(shape)
