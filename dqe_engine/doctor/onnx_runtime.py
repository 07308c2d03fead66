"""ONNX Runtime: which of the packages is installed, and which providers really run a graph.

`get_available_providers()` lists what the package was built with, on any machine. So each provider runs a graph, with the
CPU forbidden to take over, and is asked afterwards whether it did.
"""

from __future__ import annotations

import re
from dataclasses import replace
from importlib import import_module
from typing import Any

import numpy as np

from .capture import captured_stderr
from .findings import NO_DEVICE, Context, Finding, Steps, Trying, one_line
from .tiny_graph import SIDE, integer_graph, tiny_graph
from .twins import INSTALL, Twins

DISTRIBUTIONS = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino", "onnxruntime-rocm", "onnxruntime-qnn")
ENGINE_PROVIDERS = {"CPUExecutionProvider": "cpu", "CUDAExecutionProvider": "cuda"}
"""Those that run without more libraries than CUDA's, by the engine's names: a bundle is tried on each that works."""
_TENSORRT = "TensorrtExecutionProvider"
"""The engine's ort-tensorrt. It wants TensorRT's libraries, which few have, and takes minutes to build its engines."""
_NEED_DEVICE = ("CUDAExecutionProvider", "TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider")
_NO_GRAPHS = ("AzureExecutionProvider",)
"""Calls a service for custom operators: it runs no graph of ours anywhere."""


def probe_package(context: Context) -> Steps:
    """Which package, which providers it lists, and what its 8-bit products are on this processor."""
    twins = Twins("onnxruntime", DISTRIBUTIONS, mark="InferenceSession")
    yield twins.trying()
    ort, package = twins.load()
    if ort is None:
        yield package
        return
    providers = list(ort.get_available_providers())
    cuda = _built_with("cuda_version")
    found = f"{package.found}, built for CUDA {cuda}" if cuda and package.status == "ok" else package.found
    yield replace(package, found=found, facts=package.facts | {"providers": providers})
    yield Trying("8-bit products", _remedy("CPUExecutionProvider"))
    yield _products(ort)


def probe(context: Context) -> Steps:
    providers: list[str] = []
    for step in probe_package(context):
        if isinstance(step, Finding):
            providers = step.facts.get("providers", providers)
        yield step
    ort = import_module("onnxruntime") if providers else None
    for provider in providers:
        if provider not in _NO_GRAPHS:
            name = f"{provider.removesuffix('ExecutionProvider').replace('Tensorrt', 'TensorRT')} provider"
            yield Trying(name, _remedy(provider))
            yield _provider(ort, name, provider, context.devices)


def _products(ort: Any) -> Finding:
    """Unsigned times signed 8-bit numbers, as large as they get: AVX2 without VNNI adds pairs of them in 16 bits, which overflow."""
    a, b = np.full((SIDE, SIDE), 255, np.uint8), np.full((SIDE, SIDE), 127, np.int8)
    session = ort.InferenceSession(integer_graph(), providers=["CPUExecutionProvider"])
    (y,) = session.run(["y"], {"a": a, "b": b})
    exact = a.astype(np.int32) @ b.astype(np.int32)
    if np.array_equal(y, exact):
        return Finding("8-bit products", "ok", "exact", facts={"int8_saturates": False})
    if (y > 0).all() and (y < exact).all():
        found = "saturate, as they do on x86-64 without VNNI: int8 graphs that use all 8 bits answer otherwise here than elsewhere"
        return Finding("8-bit products", "ok", found, facts={"int8_saturates": True})
    return Finding("8-bit products", "broken", f"gave {y.flat[0]}, expected {exact.flat[0]}", _remedy("CPUExecutionProvider"))


def _provider(ort: Any, name: str, provider: str, devices: int) -> Finding:
    engine_name = ENGINE_PROVIDERS.get(provider)
    facts = {"provider": engine_name} if engine_name else {}
    with captured_stderr() as said:
        wrong = _what_is_wrong(ort, provider)
    if wrong is None:
        use = "" if engine_name else ", for --provider ort-tensorrt" if provider == _TENSORRT else "; the engine does not use it"
        return Finding(name, "ok", f"runs a graph{use}", facts=facts)
    if provider in _NEED_DEVICE and not devices:
        return Finding(name, "not available", "in the package, but there is no CUDA device", NO_DEVICE, facts)
    if missing := re.search(r"with error: (\S+\.so\S*: [^\n]+)", said()):  # the exception does not say why it did not load
        wrong = f"does not load: {one_line(missing[1])}"
    if engine_name is None:
        remedy = _remedy(provider) if provider == _TENSORRT else "nothing to do: the engine does not use it"
        return Finding(name, "not available", f"in the package; {wrong}", remedy, facts)
    required = re.search(r"Require (cuDNN \S+ and CUDA \d+(?:\.\d+)*(?:\.\*)?)", said())
    return Finding(name, "broken", wrong, _remedy(provider, required[1] if required else None), facts)


def _what_is_wrong(ort: Any, provider: str) -> str | None:
    """None if the provider alone runs the tiny graph and gets it right."""
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors only
    if provider != "CPUExecutionProvider":
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    x = np.arange(SIDE * SIDE, dtype=np.float32).reshape(SIDE, SIDE) % 5  # whole numbers: exact in any precision
    try:
        session = ort.InferenceSession(tiny_graph(), options, providers=[provider], enable_fallback=0)
        used = session.get_providers()
        if used[0] != provider:
            return f"ONNX Runtime took {used[0]} without a word"
        (y,) = session.run(["y"], {"x": x})
    except Exception as error:  # ONNX Runtime's exceptions share no base class but Exception
        return one_line(error)
    return None if np.array_equal(y, x @ x) else "a matrix product came out wrong"


def _remedy(provider: str, required: str | None = None) -> str:
    if provider == "CUDAExecutionProvider":
        libraries = required or f"cuDNN and CUDA {_built_with('cuda_version') or ''}".strip()
        return f"install {libraries}, with their folders in LD_LIBRARY_PATH; until then use --provider cpu"
    if provider == _TENSORRT:
        return "for --provider ort-tensorrt, install TensorRT's libraries; --provider tensorrt and cuda do not need this one"
    return f"reinstall ONNX Runtime: {INSTALL}"


def _built_with(name: str) -> str | None:
    """What the package says about its build; CPU builds say nothing."""
    try:
        value = getattr(import_module("onnxruntime.capi.build_and_package_info"), name, None)
    except ImportError:
        return None
    return str(value) if value else None
