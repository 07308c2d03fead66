"""The builder's side: a network is the ONNX graph that was read into it, and a plan holds that graph behind a line of JSON."""

from __future__ import annotations

import ctypes
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import onnx

from .abi import Shape, log, native
from .base import INFO, VERBOSE, TensorRTObject

if TYPE_CHECKING:
    from ..fake_tensorrt import FakeTensorRT


class Builder(TensorRTObject):
    kind = "IBuilder"

    def createBuilderConfig(self) -> int:
        return BuilderConfig(self.fake, self.logger).address

    def createNetworkV2(self, flags: int) -> int:
        self.faults.network_flags.append(flags)
        return NetworkDefinition(self.fake, self.logger).address

    def createOptimizationProfile(self) -> int:
        return self.part(OptimizationProfile(self.fake))

    def buildSerializedNetwork(self, network: int, config: int) -> int:
        graph, settings = native(network), native(config)
        assert graph.parser is None or graph.parser.alive, "the network's weights are its parser's"
        log(self.logger, INFO, "building")
        log(self.logger, VERBOSE, "chatter")
        for number in range(self.faults.log_lines):
            log(self.logger, INFO, f"line {number}")
        if self.faults.build:
            return self.refuse(self.faults.build)
        if graph.inputs and not settings.profiles:
            return self.refuse("Error Code 4: API Usage Error (Network has dynamic or shape inputs, but no optimization profile)")
        if settings.cache is not None:
            native(settings.cache)  # it must live until the build has ended
        flags, names = settings.flags, self.trt.BuilderFlag
        header = {"vc": int(names.VERSION_COMPATIBLE) in flags, "tf32": int(names.TF32) in flags, "hc": settings.compatibility == 1}
        header |= {"level": settings.level, "workspace": settings.workspace, "verbosity": settings.verbosity}
        return HostMemory(self.fake, self.fake.plan(graph.model, settings.profiles, **header)).address


class NetworkDefinition(TensorRTObject):
    """What the parser reads into it, or a sum that is built by hand (the doctor's)."""

    kind = "INetworkDefinition"

    def __init__(self, fake: FakeTensorRT, logger: int) -> None:
        super().__init__(fake, logger)
        self.model, self.inputs = b"", False
        self.parser: Parser | None = None
        self._fixed: list[onnx.ValueInfoProto] = []

    def addInput(self, name: bytes, kind: int, shape: int) -> int:
        self._fixed.append(onnx.helper.make_tensor_value_info(name.decode(), onnx.TensorProto.FLOAT, Shape.from_address(shape).tuple()))
        return self.part(Tensor(self.fake))

    def addElementWise(self, first: int, second: int, operation: int) -> int:
        assert operation == int(self.trt.ElementWiseOperation.SUM)
        return self.part(Layer(self.fake))

    def markOutput(self, tensor: int) -> None:
        (given,) = self._fixed
        output = onnx.ValueInfoProto()
        output.CopyFrom(given)
        output.name = "(Unnamed Layer* 0)_output"
        graph = onnx.helper.make_graph([onnx.helper.make_node("Add", [given.name] * 2, [output.name])], "sum", [given], [output])
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
        self.model = model.SerializeToString()


class Layer(TensorRTObject):
    kind = "ILayer"

    def getOutput(self, index: int) -> int:
        return self.part(Tensor(self.fake))


class Tensor(TensorRTObject):
    kind = "ITensor"


class Parser(TensorRTObject):
    kind = "IParser"

    def __init__(self, fake: FakeTensorRT, network: NetworkDefinition, logger: int) -> None:
        super().__init__(fake, logger)
        self.network = network
        network.parser = self

    def parseFromFile(self, model: bytes, verbosity: int) -> bool:
        codes = self.trt.ErrorCode
        try:
            proto = onnx.load(model.decode())
        except Exception as error:  # whatever is wrong with a file, a parser reports it
            self.part(ParserError(self.fake, codes.MODEL_DESERIALIZE_FAILED, "", "", str(error)))
            return False
        self.network.model, self.network.inputs = proto.SerializeToString(), bool(proto.graph.input)
        for node in proto.graph.node:
            if node.op_type in self.faults.unsupported:
                self.part(ParserError(self.fake, codes.UNSUPPORTED_NODE, node.op_type, node.name, "no importer"))
            if node.op_type == "Invalid":
                self.part(ParserError(self.fake, codes.INVALID_NODE, node.op_type, node.name, "assertion\nfailed"))
        return not self.parts

    def getNbErrors(self) -> int:
        return len(self.parts)

    def getError(self, index: int) -> int:
        return self.parts[index].address


class ParserError(TensorRTObject):
    kind = "IParserError"

    def __init__(self, fake: FakeTensorRT, code: Any, operator: str, name: str, text: str) -> None:
        super().__init__(fake)
        self._code, self._operator, self._name, self._text = int(code), self.keep(operator), self.keep(name), self.keep(text)

    def code(self) -> int:
        return self._code

    def desc(self) -> int:
        return self._text

    def nodeName(self) -> int:
        return self._name

    def nodeOperator(self) -> int:
        return self._operator


class OptimizationProfile(TensorRTObject):
    kind = "IOptimizationProfile"

    def __init__(self, fake: FakeTensorRT) -> None:
        super().__init__(fake)
        self.shapes: dict[str, list[tuple[int, ...]]] = {}

    def setDimensions(self, name: bytes, which: int, shape: int) -> bool:
        found = self.shapes.setdefault(name.decode(), [])
        assert which == len(found), "the bindings set min, opt, max"
        found.append(Shape.from_address(shape).tuple())
        return all(len(a) == len(b) and all(x <= y for x, y in zip(a, b, strict=True)) for a, b in pairwise(found))

    def isValid(self) -> bool:
        return all(len(shapes) == 3 for shapes in self.shapes.values())


class BuilderConfig(TensorRTObject):
    kind = "IBuilderConfig"

    def __init__(self, fake: FakeTensorRT, logger: int) -> None:
        super().__init__(fake, logger)
        self.flags = {int(self.trt.BuilderFlag.TF32)}  # on by default
        self.profiles: list[Any] = []
        self.workspace: int | None = None
        self.cache: int | None = None
        self.level, self.verbosity, self.compatibility = 3, 0, 0

    def addOptimizationProfile(self, profile: int) -> int:
        if not native(profile).shapes:
            return -1
        self.profiles.append(native(profile).shapes)
        return len(self.profiles) - 1

    def setMemoryPoolLimit(self, pool: int, size: int) -> None:
        assert pool == int(self.trt.MemoryPoolType.WORKSPACE)
        self.workspace = size

    def setFlag(self, flag: int) -> None:
        self.flags.add(flag)

    def clearFlag(self, flag: int) -> None:
        self.flags.discard(flag)

    def getFlag(self, flag: int) -> bool:
        return flag in self.flags

    def createTimingCache(self, blob: int | None, size: int) -> int:
        return TimingCache(self.fake, ctypes.string_at(blob or 0, size) if size else b"").address

    def setTimingCache(self, cache: int, ignore_mismatch: bool) -> bool:
        raw = native(cache).raw
        if raw and (self.faults.refuse_cache or (raw != self.fake.cache() and not ignore_mismatch)):
            return bool(self.refuse("Error Code 4: Internal Error (the timing cache was made on another device or by another version)"))
        self.cache = cache
        return True

    def getTimingCache(self) -> int | None:
        return None if self.level == 0 else self.cache

    def setBuilderOptimizationLevel(self, level: int) -> None:
        self.level = level

    def getBuilderOptimizationLevel(self) -> int:
        return self.level

    def setProfilingVerbosity(self, verbosity: int) -> None:
        self.verbosity = verbosity

    def getProfilingVerbosity(self) -> int:
        return self.verbosity

    def setHardwareCompatibilityLevel(self, level: int) -> None:
        self.compatibility = level

    def getHardwareCompatibilityLevel(self) -> int:
        return self.compatibility


class TimingCache(TensorRTObject):
    kind = "ITimingCache"

    def __init__(self, fake: FakeTensorRT, raw: bytes) -> None:
        super().__init__(fake)
        self.raw = raw

    def serialize(self) -> int:
        return HostMemory(self.fake, self.fake.cache()).address


class HostMemory(TensorRTObject):
    kind = "IHostMemory"

    def __init__(self, fake: FakeTensorRT, raw: bytes) -> None:
        super().__init__(fake)
        self._size, self._data = len(raw), self.keep(raw)

    def data(self) -> int:
        return self._data

    def size(self) -> int:
        return self._size

    def type(self) -> int:
        return int(self.trt.DataType.INT8)
