"""TensorRT: its package, its library, and a small engine built and loaded where there is a device.

Without a device `Runtime` and `Builder` can take the process down, so they are left alone; importing the package loads libnvinfer.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from .findings import NO_DEVICE, Context, Finding, Steps, Trying, one_line
from .packages import installed_of, listed

DISTRIBUTIONS = ("tensorrt", "tensorrt-cu12", "tensorrt-cu13", "tensorrt-lean", "tensorrt-dispatch")
_INSTALL = "pip install 'dqe-engine[tensorrt]' on a machine with an NVIDIA GPU"
_REINSTALL = "pip install --force-reinstall 'tensorrt>=10.3,<12'; its version must fit the driver's CUDA"


def probe(context: Context) -> Steps:
    installed = installed_of(DISTRIBUTIONS)
    yield Trying("package", _REINSTALL)
    try:
        tensorrt = import_module("tensorrt")
    except ModuleNotFoundError as error:
        if installed or error.name != "tensorrt":
            raise
        yield Finding("package", "not installed", "no tensorrt", _INSTALL)
        return
    except ImportError as error:  # most often its libraries are not found
        names = listed(installed) or "tensorrt"
        yield Finding("package", "broken", f"{names} cannot be imported: {one_line(error)}", _REINSTALL, {"packages": installed})
        return
    version = tensorrt.__version__
    yield Finding("package", "ok", f"tensorrt {version}; libnvinfer loads", facts={"version": version, "packages": installed})
    if not context.devices:
        yield Finding("engine", "not available", "there is no CUDA device to build for", NO_DEVICE)
        return
    yield Trying("engine", _REINSTALL)
    yield _engine(tensorrt)


def _engine(trt: Any) -> Finding:
    """Build y = x + x at the lowest optimisation level, and load the plan."""
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network()
    x = network.add_input("x", trt.float32, (4,))
    network.mark_output(network.add_elementwise(x, x, trt.ElementWiseOperation.SUM).get_output(0))
    config = builder.create_builder_config()
    config.builder_optimization_level = 0
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        return Finding("engine", "broken", "the builder gave no engine for x + x", _REINSTALL)
    engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
    if engine is None or engine.num_io_tensors != 2:
        return Finding("engine", "broken", "an engine that was just built does not load", _REINSTALL)
    return Finding("engine", "ok", "builds and loads a small one")
