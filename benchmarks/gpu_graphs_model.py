"""One model on one device, as PyTorch's modules and as graphs in ONNX Runtime's sessions: what `gpu_graphs` compares."""

from __future__ import annotations

import copy
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file

from dqe_engine.contracts.graphs import QUERY_ENCODER, VISION_ENCODER, GraphSpec
from dqe_engine.contracts.parsing import parse
from dqe_engine.contracts.vocabulary import AttributeVocabulary
from dqe_export.graphs import graph_module, random_inputs
from dqe_training.config import ModelConfig
from dqe_training.model import DQEModel

from .weightless import fill, random_values

SPECS = {spec.name: spec for spec in (VISION_ENCODER, QUERY_ENCODER)}
UPSTREAM = "upstream"
"""Marks a query encoder whose cross-attention makes keys and values of the image tokens, as BLIP-2 does."""
GPU_FORM = "gpu"
"""Marks a graph in the form for GPUs (`dqe-export --target cuda`)."""
Tensors = dict[str, torch.Tensor]
Call = Callable[[], Tensors]

EAGER, REPLAYED = "PyTorch f16", "PyTorch f16, CUDA graph"
LAYERS, COMPILED = "PyTorch f16, layers compiled, CUDA graph", "PyTorch f16, compiled, reduce-overhead"
F16, F32, EXACT, SEEN = "ORT CUDA f16", "ORT CUDA f32", "ORT CUDA f32, no TF32", "ORT CUDA f16, upstream attention"
CAPTURED, FIXED = "ORT CUDA f16, CUDA graph", "ORT CUDA f16, fixed shape"
FOR_GPUS = "ORT CUDA f16, graph for GPUs"
TENSORRT, TENSORRT_FOR_GPUS = "ORT TensorRT f16", "ORT TensorRT f16, graph for GPUs"
MARKS = {SEEN: UPSTREAM, FOR_GPUS: GPU_FORM, TENSORRT_FOR_GPUS: GPU_FORM}
TEXT_LENGTH = 16
WARM_UP = 3
_LAYERS = ("Blip2EncoderLayer", "Blip2QFormerLayer")
Opened = Callable[[str, int, float, Mapping[str, Any]], None]
"""Told of every session: contender, batch, seconds that opening took, and where its nodes are."""


def shapes_of(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Of the parameters that have values."""
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters() if parameter.device.type != "meta"}


class Model:
    """PyTorch's module in float32 and float16, and files of its graphs, all with the same weights."""

    def __init__(self, folder: Path, spec: GraphSpec, device: str, work: Path | None) -> None:
        about = json.loads((folder / "model.json").read_bytes())
        config = parse(ModelConfig, about["config"], where="model.json")
        vocabulary = parse(AttributeVocabulary, about["vocabulary"], where="model.json")
        with torch.device(device):
            self.model = DQEModel(config, vocabulary, about["words"], empty_vision=spec != VISION_ENCODER).eval()
        self.spec, self.device, self.words, self.sizes = spec, device, about["words"], self.model.sizes
        self.module = graph_module(spec, self.model)
        parameters = dict(self.module.named_parameters())
        stored = load_file(folder / "weights.safetensors") if (folder / "weights.safetensors").exists() else None
        shapes = shapes_of(self.module)
        if stored is not None:  # what a later version of the model has besides is in no graph
            shapes = {name: shape for name, shape in shapes.items() if name.removeprefix("model.") in stored}

        def values(name: str, shape: Sequence[int]) -> NDArray[np.float32]:
            return random_values(name, shape) if stored is None else stored[name.removeprefix("model.")].astype(np.float32)

        def put(name: str, array: NDArray[np.float32]) -> None:
            parameters[name].data.copy_(torch.from_numpy(array))

        sources = sorted(folder.glob(f"{spec.name}-*.onnx")) if work else []
        self.files = {source.stem: work / source.name for source in sources if work}
        fill({source: self.files[source.stem] for source in sources}, about["graphs"], shapes, values, put)
        self.half = copy.deepcopy(self.module).half()
        self._sessions: dict[str, Any] = {}

    def inputs(self, batch: int) -> Tensors:
        made = random_inputs(self.spec, self.sizes, self.words, batch=batch, text_length=TEXT_LENGTH, seed=batch)
        return {name: tensor.to(self.device) for name, tensor in made.items()}

    def named(self, outputs: Any) -> Tensors:
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return {tensor.name: value for tensor, value in zip(self.spec.outputs, outputs, strict=True)}

    def eager(self, module: Callable[..., Any], inputs: Tensors, dtype: torch.dtype) -> Tensors:
        """In the precision of `module`, from float32 inputs."""
        return self.named(module(**{name: t.to(dtype) if t.is_floating_point() else t for name, t in inputs.items()}))

    def exact(self, inputs: Tensors) -> Tensors:
        return self.eager(self.module, inputs, torch.float32)

    def rounded(self, inputs: Tensors) -> Call:
        return partial(self.eager, self.half, inputs, torch.float16)

    def call(self, contender: str, inputs: Tensors, opened: Opened) -> Call:
        """Raises whatever the runtime raises where it cannot run that."""
        if contender == EAGER:
            return self.rounded(inputs)
        if contender == REPLAYED:
            return replayed(self.rounded(inputs))
        if contender == LAYERS:
            compiled = partial(self.eager, self.compiled_layers(), inputs, torch.float16)
            return replayed(compiled) if self.device == "cuda" else compiled
        if contender == COMPILED:
            return self.compiled_whole(inputs)
        precision = "f32" if "f32" in contender else "f16"
        path = self.files[f"{self.spec.name}-{precision}" + (f"-{MARKS[contender]}" if contender in MARKS else "")]
        batch = len(next(iter(inputs.values())))
        fixed = {"batch": batch, "text_length": TEXT_LENGTH} if contender in (FIXED, CAPTURED) else {}
        key = f"{contender} {batch}" if fixed else contender
        if key not in self._sessions:
            provider = {"CPU": "CPU", "TensorRT": "Tensorrt"}.get(contender.split(" ")[1], "CUDA") if self.device == "cuda" else "CPU"
            options: dict[str, str] = {}
            if provider == "CUDA":
                options = {"use_tf32": str(int(contender != EXACT)), "enable_cuda_graph": str(int(contender == CAPTURED))}
            started = time.perf_counter()
            session = open_session(path, f"{provider}ExecutionProvider", options, fixed)
            opened(contender, batch, time.perf_counter() - started, placement(session))
            if fixed:  # of one batch alone
                return self.bound(session, inputs)
            self._sessions[key] = session
        return self.bound(self._sessions[key], inputs)

    def compiled_layers(self) -> torch.nn.Module:
        """`half` with each layer through PyTorch's compiler: layers of one kind share a result, so that it takes seconds."""
        half = copy.deepcopy(self.half)
        for module in half.modules():
            if type(module).__name__ in _LAYERS:
                module.compile(dynamic=False)
        return half

    def compiled_whole(self, inputs: Tensors) -> Call:
        """Compiled anew for every shape, with CUDA graphs where there is a device."""
        whole = torch.compile(self.half, mode="reduce-overhead", dynamic=False)

        def call() -> Tensors:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
            return self.eager(whole, inputs, torch.float16)

        return call

    def bound(self, session: Any, inputs: Tensors) -> Call:
        """A call of `session` on tensors that stay where they are."""
        device = "cpu" if session.get_providers()[0].startswith("CPU") else self.device
        given = {name: tensor.to(device).contiguous() for name, tensor in inputs.items()}
        batch = len(next(iter(inputs.values())))
        shapes = {t.name: t.shape(self.sizes, batch=batch, text_length=TEXT_LENGTH) for t in self.spec.outputs}
        outputs = {name: torch.empty(shape, device=device) for name, shape in shapes.items()}
        binding = session.io_binding()
        types = {torch.float32: np.float32, torch.int64: np.int64}
        for bind, tensors in ((binding.bind_input, given), (binding.bind_output, outputs)):
            for name, tensor in tensors.items():
                bind(name, device, 0, types[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())

        def call() -> Tensors:
            assert given  # the binding holds their addresses alone
            session.run_with_iobinding(binding)
            return outputs

        return call

    def forget(self) -> None:
        self._sessions.clear()


def open_session(path: Path, provider: str, options: Mapping[str, str], fixed: Mapping[str, int]) -> Any:
    import onnxruntime  # after torch, which brings CUDA's libraries

    settings = onnxruntime.SessionOptions()
    settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    for axis, size in fixed.items():
        settings.add_free_dimension_override_by_name(axis, size)
    providers = [(provider, dict(options))] + [("CPUExecutionProvider", {})] * (provider != "CPUExecutionProvider")
    session = onnxruntime.InferenceSession(str(path), settings, providers=providers, enable_fallback=0)
    if session.get_providers()[0] != provider:
        raise RuntimeError(f"asked for {provider}, ONNX Runtime chose {session.get_providers()[0]}")
    return session


def placement(session: Any) -> dict[str, Any]:
    """Nodes by provider, and the operators of those that a device left to the CPU."""
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return {}
    parts = [(part.ep_name, node.op_type) for part in session.get_provider_graph_assignment_info() for node in part.get_nodes()]
    counts: dict[str, Any] = dict(Counter(provider for provider, _ in parts))
    if len(counts) > 1:
        counts["on the CPU"] = dict(Counter(kind for provider, kind in parts if provider.startswith("CPU")))
    return counts


def replayed(call: Call) -> Call:
    """`call` as one CUDA graph."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()

    def replay() -> Tensors:
        graph.replay()
        return outputs

    return replay


def has_tensorrt() -> bool:
    import onnxruntime

    try:
        import tensorrt  # noqa: F401
    except ImportError:
        return False
    return "TensorrtExecutionProvider" in onnxruntime.get_available_providers()
