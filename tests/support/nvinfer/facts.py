"""Where the compiled bindings look for each function that our code reaches: slots of TensorRT's virtual tables.

The bindings hold no symbol of most of TensorRT's functions: a call goes through the table of an interface object, at a
position that its public header fixes. These positions, and the length of each table, are facts of the headers of
10.16 and 11.1 (`NvInferImpl.h`: `apiv::V...`, `NvOnnxParser.h`); `g++ -fdump-lang-class` counts them. Every other slot ends
the process with a message. To add a function: a line here, a method of that name in `building.py` or `running.py`.
"""

from __future__ import annotations

from typing import NamedTuple

VERSIONS = ("10.16.1.11", "11.1.0.106")
"""Wheels of `tensorrt-cu13-bindings` that the table describes; the columns below are in this order."""

LOGGER_LOG = (0, 4)
"""The slot of `ILogger::log(severity, text)`, the one function that the libraries call: 11 gave loggers a base class."""

PUBLIC_SLOTS = {"INetworkDefinition": 3, "IBuilderConfig": 3}
"""Slots of an object's own table, before the one behind it; 2 for all others: the destructors, of which `delete` takes slot 1."""


class Method(NamedTuple):
    """`signature`: result and parameters, v nothing, b bool, i int32, u uint32, l int64 or a size, s text, p pointer.

    S is a shape returned by value, which a ctypes callback cannot do: `libraries.cpp` does.
    """

    slots: tuple[int, int]
    signature: str


class Table(NamedTuple):
    """`length` by version. `plain`: the object has only this table, with its deleting destructor where `plain` says."""

    length: tuple[int, int]
    methods: dict[str, Method]
    plain: tuple[int, int] | None = None


def _table(first: int, second: int, /, *, plain: tuple[int, int] | None = None, **methods: tuple[int, int, str]) -> Table:
    return Table((first, second), {name: Method((old, new), signature) for name, (old, new, signature) in methods.items()}, plain)


TABLES = {
    "IBuilder": _table(
        23, 20,
        createBuilderConfig=(7, 5, "p"), createNetworkV2=(8, 6, "pu"), createOptimizationProfile=(9, 7, "p"),
        buildSerializedNetwork=(14, 11, "ppp"),
    ),
    "INetworkDefinition": _table(
        91, 89,
        addInput=(2, 2, "psip"), markOutput=(3, 3, "vp"), addElementWise=(9, 9, "pppi"),
    ),
    "ILayer": _table(22, 15, getOutput=(8, 8, "pi")),
    "ITensor": _table(25, 19),
    "IOptimizationProfile": _table(12, 10, setDimensions=(2, 2, "bsip"), isValid=(9, 7, "b")),
    "IBuilderConfig": _table(
        68, 60,
        clearFlag=(10, 8, "vi"), setFlag=(11, 9, "vi"), getFlag=(12, 10, "bi"),
        addOptimizationProfile=(25, 23, "ip"), setProfilingVerbosity=(27, 25, "vi"), getProfilingVerbosity=(28, 26, "i"),
        createTimingCache=(40, 29, "ppl"), setTimingCache=(41, 30, "bpb"), getTimingCache=(42, 31, "p"),
        setMemoryPoolLimit=(43, 32, "vil"), setBuilderOptimizationLevel=(47, 36, "vi"), getBuilderOptimizationLevel=(48, 37, "i"),
        setHardwareCompatibilityLevel=(49, 38, "vi"), getHardwareCompatibilityLevel=(50, 39, "i"),
    ),
    "ITimingCache": _table(8, 8, serialize=(2, 2, "p")),
    "IHostMemory": _table(5, 5, data=(2, 2, "p"), size=(3, 3, "l"), type=(4, 4, "i")),
    "IRuntime": _table(
        24, 23,
        deserializeCudaEngine=(3, 3, "ppl"), setEngineHostCodeAllowed=(21, 20, "vb"), getEngineHostCodeAllowed=(22, 21, "b"),
    ),
    "ICudaEngine": _table(
        59, 51,
        getNbLayers=(3, 3, "i"),
        createExecutionContext=(5, 5, "pi"), getNbOptimizationProfiles=(10, 8, "i"), getProfilingVerbosity=(17, 13, "i"),
        createEngineInspector=(18, 14, "p"), getTensorShape=(19, 15, "Ss"), getTensorDataType=(20, 16, "is"),
        getTensorIOMode=(23, 19, "is"), getProfileShape=(29, 25, "Ssii"), getNbIOTensors=(30, 26, "i"), getIOTensorName=(31, 27, "pi"),
        getHardwareCompatibilityLevel=(32, 28, "i"), getDeviceMemorySizeV2=(52, 44, "l"),
    ),
    "IExecutionContext": _table(
        54, 53,
        getEngine=(7, 7, "p"), setOptimizationProfileAsync=(17, 16, "bip"), setInputShape=(21, 20, "bsp"), getTensorShape=(22, 21, "Ss"),
        setTensorAddress=(24, 23, "bsp"), inferShapes=(28, 27, "iip"), enqueueV3=(37, 36, "bp"),
        setNvtxVerbosity=(40, 39, "bi"), getNvtxVerbosity=(41, 40, "i"), setDeviceMemoryV2=(49, 48, "vpl"),
    ),
    "IEngineInspector": _table(9, 9, getEngineInformation=(6, 6, "pi")),
    "IParser": _table(25, 23, plain=(9, 7), parseFromFile=(1, 1, "bsi"), getNbErrors=(5, 3, "i"), getError=(6, 4, "pi")),
    "IParserError": _table(
        12, 12, plain=(11, 11),
        code=(0, 0, "i"), desc=(1, 1, "p"), nodeName=(6, 6, "p"), nodeOperator=(7, 7, "p"),
    ),
}  # fmt: skip
