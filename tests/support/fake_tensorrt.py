"""TensorRT without a GPU: NVIDIA's own Python bindings over libraries whose functions end here.

Argument conversion, enums, overloads, ownership and null pointers are the real bindings'. What is made up is what the
libraries do: a plan holds the ONNX graph, and running one is ONNX Runtime between the fake device's buffers. Return values
and refusals follow the comments of the public headers.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from .fake_cuda import FakeCuda
from .nvinfer.abi import load, log, native
from .nvinfer.base import ERROR
from .nvinfer.building import Builder, Parser
from .nvinfer.facts import VERSIONS
from .nvinfer.running import Runtime

VERSION = os.environ.get("DQE_TEST_TENSORRT", VERSIONS[-1])
"""The bindings that this process loads: one version each, so another one has its tests run in a process of their own."""


class Faults:
    """What goes wrong. `unsupported`: operators that the parser lacks. `build`: the message of a build that fails.

    `error` is added to every output. `network_flags` only lists what the code asked for.
    `refuse_cache`: a timing cache with anything in it is refused. `log_lines`: how many a build logs.
    `inspection`: the text that the engine inspector gives instead of its own (bytes that are not UTF-8 become a
    UnicodeDecodeError in the bindings); `inspection_missing`: it gives a null pointer, which is None in Python.
    `infer`: the inputs that infer_shapes reports as incomplete, or a negative count, which the bindings turn into
    RuntimeError("infer_shapes error code: -1"). `profile`: switching to any profile fails, a RuntimeError of the bindings.
    `fixed_batch_shapes`: an axis that every profile pins to one size is reported as that size, not as -1. The headers say
    -1 "in place of each dynamic runtime dimension"; TensorRT 7.1 to 8.4 gave the pinned size (Triton, pull request 1987).
    """

    def __init__(self) -> None:
        self.unsupported: set[str] = {"MatMulInteger"}
        self.build = ""
        self.error = 0.0
        self.uncapturable = False
        self.enqueue = False
        self.inspection: str | bytes | None = None
        self.inspection_missing = False
        self.infer: list[str] | int = []
        self.profile = False
        self.no_builder = False
        self.no_context = False
        self.refuse_cache = False
        self.log_lines = 0
        self.fixed_batch_shapes = False
        self.network_flags: list[int] = []


class FakeTensorRT:
    """TensorRT on one fake device; `faults` may be changed at any time. `created`: the builders, runtimes and parsers so far."""

    _current: FakeTensorRT

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda, self.version, self.faults = cuda, VERSION, Faults()
        self.created: list[str] = []

    def install(self, patch: pytest.MonkeyPatch) -> FakeTensorRT:
        patch.setitem(sys.modules, "tensorrt", self.module())
        return self

    @property
    def capability(self) -> str:
        return "{}.{}".format(*self.cuda.capability)

    def module(self) -> Any:
        FakeTensorRT._current = self
        return load(self.version, _create)

    def cache(self) -> bytes:
        return f"timings of {self.version} on {self.capability}".encode()

    def plan(self, model: bytes | Path, profiles: list[Any], *, vc: bool = False, hc: bool = False, **settings: Any) -> bytes:
        """What the builder gives. `profiles`: per profile, min, opt and max of every input by name."""
        raw = model.read_bytes() if isinstance(model, Path) else model
        header = {"version": self.version, "capability": self.capability, "vc": vc, "hc": hc, "profiles": profiles, **settings}
        return json.dumps(header).encode() + b"\n" + raw


def _create(kind: bytes, first: int | None, logger: int, version: int) -> int:
    """What the exported functions of the libraries do."""
    fake = FakeTensorRT._current
    fake.created.append(kind.decode())
    if kind == b"IParser":
        assert first is not None
        return Parser(fake, native(first), logger).address
    major, minor, patch = (int(part) for part in fake.version.split(".")[:3])
    assert version == major * 10_000 + minor * 100 + patch, "the bindings are not those that the table of slots describes"
    if kind == b"IRuntime":
        assert fake.cuda.devices, "a Runtime without a device crashes the process"
        return Runtime(fake, logger).address
    if fake.faults.no_builder or not fake.cuda.devices:
        log(logger, ERROR, "createInferBuilder: Error Code 6: API Usage Error (CUDA initialization failure with error: 35)")
        return 0
    return Builder(fake, logger).address
