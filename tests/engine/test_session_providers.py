"""Providers of ONNX Runtime: chosen, refused, and given options."""

from __future__ import annotations

import stat
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from support.tiny_bundle import SIZES, query_inputs

from dqe_engine import sessions
from dqe_engine.bundle import Bundle
from dqe_engine.contracts.graphs import QUERY_ENCODER, VISION_ENCODER
from dqe_engine.errors import BackendError, InputError
from dqe_engine.sessions import OnnxSession
from dqe_engine.tensorrt.onnx_runtime import engine_cache


def test_providers(bundle_path: Path) -> None:
    path = bundle_path / VISION_ENCODER.file
    assert OnnxSession(path, VISION_ENCODER, SIZES, provider="cpu").provider == "cpu"
    assert OnnxSession(path, VISION_ENCODER, SIZES, provider="auto").provider in ("cpu", "cuda")
    with pytest.raises(InputError, match="unknown provider 'gpu'"):
        OnnxSession(path, VISION_ENCODER, SIZES, provider="gpu")
    with pytest.raises(InputError, match="unknown provider 'tensorrt'; choose auto, cpu, cuda, ort-tensorrt"):
        OnnxSession(path, VISION_ENCODER, SIZES, provider="tensorrt")  # a bundle opens those
    with pytest.raises(InputError, match="threads"):
        OnnxSession(path, VISION_ENCODER, SIZES, threads=0)


def fake_onnxruntime(monkeypatch: pytest.MonkeyPatch, *, raises: bool) -> None:
    """An ONNX Runtime that lists CUDA, and cannot run it: by an error, or by taking the CPU without a word."""
    import onnxruntime

    class Session(onnxruntime.InferenceSession):
        def __init__(self, path: str, options: Any, *, providers: list[str], provider_options: Any, **rest: Any) -> None:
            assert rest["enable_fallback"] == 0
            assert rest["disabled_optimizers"] is None or providers == ["CPUExecutionProvider"]
            off = {"use_tf32": "0"}  # TF32 leaves float32's tolerance
            assert provider_options == [off if name == "CUDAExecutionProvider" else {} for name in providers]
            if providers != ["CPUExecutionProvider"]:  # TensorRT needs the pairs around its 8-bit products whole
                with pytest.raises(RuntimeError):
                    options.get_session_config_entry("session.disable_quant_qdq")
            if raises and "CUDAExecutionProvider" in providers:
                raise RuntimeError("CUDA failure 35:\n no driver")
            super().__init__(path, options, providers=["CPUExecutionProvider"])

    fake = types.SimpleNamespace(
        InferenceSession=Session,
        SessionOptions=onnxruntime.SessionOptions,
        get_available_providers=lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"],
    )
    monkeypatch.setitem(sys.modules, "onnxruntime", fake)


@pytest.mark.parametrize("raises", [True, False])
def test_cuda_that_does_not_run_is_an_error_and_auto_says_cpu(bundle_path: Path, monkeypatch: pytest.MonkeyPatch, raises: bool) -> None:
    fake_onnxruntime(monkeypatch, raises=raises)
    path = bundle_path / VISION_ENCODER.file
    with pytest.raises(BackendError, match="cannot run on cuda, .*: CUDA failure 35: no driver" if raises else "asked for cuda"):
        OnnxSession(path, VISION_ENCODER, SIZES, provider="cuda")
    assert OnnxSession(path, VISION_ENCODER, SIZES, provider="auto").provider == "cpu"


RESIDUAL = """
<ir_version: 9, opset_import: ["" : 20]>
residual (float[B, L, 8] x, float[B, L, 8] y) => (float[B, L, 8] z)
<float[8] scale = {1, 1, 1, 1, 1, 1, 1, 1}, float[8] bias = {0, 0, 0, 0, 0, 0, 0, 0}>
{
    sum = Add (x, y)
    z = LayerNormalization <axis = -1> (sum, scale, bias)
}
"""
STATIC_INT8 = """
<ir_version: 9, opset_import: ["" : 20]>
product (float[B, 8] x) => (float[B, 2] y)
<float step = {0.01}, int8 zero = {0}, int8[8, 2] weights = {127, 1, 127, 2, 127, 3, 127, 4, 127, 5, 127, 6, 127, 7, 127, 8}>
{
    codes = QuantizeLinear (x, step, zero)
    rounded = DequantizeLinear (codes, step, zero)
    matrix = DequantizeLinear (weights, step, zero)
    y = MatMul (rounded, matrix)
}
"""


def operators_that_run(text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[set[str], set[str]]:
    """What ONNX Runtime makes of a graph by itself, and with our settings for the CPU."""
    import onnxruntime

    class Session(onnxruntime.InferenceSession):
        def __init__(self, path: str, options: Any, **named: Any) -> None:
            options.optimized_model_filepath = str(folder / "ours.onnx")
            super().__init__(path, options, **named)

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "theirs.onnx")
    graph = folder / "graph.onnx"
    onnx.save(onnx.parser.parse_model(text), graph)
    onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    sessions._open_session(graph, "cpu", 1)
    theirs, ours = ({node.op_type for node in onnx.load(folder / name).graph.node} for name in ("theirs.onnx", "ours.onnx"))
    return theirs, ours


def test_the_slower_fusion_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime takes any name to leave out and says nothing to one that it does not have, so what it makes of a graph is looked at."""
    theirs, ours = operators_that_run(RESIDUAL, tmp_path, monkeypatch)
    assert "SkipLayerNormalization" in theirs
    assert "SkipLayerNormalization" not in ours


def test_products_with_fixed_scales_are_multiplied_in_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their fused kernels overflow on processors without VNNI."""
    theirs, ours = operators_that_run(STATIC_INT8, tmp_path, monkeypatch)
    assert "MatMul" not in theirs
    assert "MatMul" in ours


@pytest.mark.parametrize("provider", ["cuda", "ort-tensorrt"])
def test_a_provider_that_is_not_in_the_build(bundle_path: Path, provider: Any) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    with pytest.raises(BackendError, match=f"provider '{provider}': .* install onnxruntime-gpu"):
        OnnxSession(bundle_path / VISION_ENCODER.file, VISION_ENCODER, SIZES, provider=provider)


def listing_onnxruntime(monkeypatch: pytest.MonkeyPatch, provider: str, nodes: list[str] | None) -> list[list[str]]:
    """An ONNX Runtime that lists `provider` first and gives its nodes to `nodes`, None for a version that cannot say; what it was asked."""
    import onnxruntime

    asked: list[list[str]] = []

    class Session:
        def __init__(self, path: str, options: Any, *, providers: list[str], provider_options: Any, **rest: Any) -> None:
            asked.append(providers)
            self._real, self._providers = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]), providers
            if nodes is not None:
                self.get_provider_graph_assignment_info = lambda: [types.SimpleNamespace(ep_name=name) for name in nodes]

        def get_providers(self) -> list[str]:
            return self._providers

        def __getattr__(self, name: str) -> Any:
            if name == "get_provider_graph_assignment_info":
                raise AttributeError(name)
            return getattr(self._real, name)

    fake = types.SimpleNamespace(
        InferenceSession=Session,
        SessionOptions=onnxruntime.SessionOptions,
        get_available_providers=lambda: [provider, "CUDAExecutionProvider", "CPUExecutionProvider"],
    )
    monkeypatch.setitem(sys.modules, "onnxruntime", fake)
    return asked


@pytest.mark.parametrize("nodes", [["CPUExecutionProvider", "TensorrtExecutionProvider"], None])
def test_onnx_runtimes_tensorrt(bundle_path: Path, monkeypatch: pytest.MonkeyPatch, nodes: list[str] | None) -> None:
    asked = listing_onnxruntime(monkeypatch, "TensorrtExecutionProvider", nodes)
    session = OnnxSession(bundle_path / VISION_ENCODER.file, VISION_ENCODER, SIZES, provider="ort-tensorrt")
    assert session.provider == "ort-tensorrt"
    assert asked == [["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]]


class TensorRTProvider:
    """An ONNX Runtime with TensorRT's provider: the options of each session that was made, the batches that were run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, takes_parts: bool = False) -> None:
        import onnxruntime

        self.options: list[dict[str, str]] = []
        self.batches: list[int] = []
        provider = self

        class Session(onnxruntime.InferenceSession):
            def __init__(self, path: str, options: Any, *, providers: list[str], provider_options: Any, **rest: Any) -> None:
                assert providers[0] == "TensorrtExecutionProvider"
                assert provider_options[1:] == [{"use_tf32": "0"}, {}]
                provider.options.append(provider_options[0])
                if takes_parts and "trt_profile_min_shapes" in provider_options[0]:
                    raise RuntimeError("User needs to provide all the dynamic shape inputs with associated profiles")
                super().__init__(path, options, providers=["CPUExecutionProvider"])

            def get_providers(self) -> list[str]:
                return ["TensorrtExecutionProvider", "CPUExecutionProvider"]

            def get_provider_graph_assignment_info(self) -> list[Any]:
                return [types.SimpleNamespace(ep_name="TensorrtExecutionProvider")]

            def run(self, names: list[str], inputs: dict[str, np.ndarray]) -> Any:
                provider.batches.append(len(next(iter(inputs.values()))))
                return super().run(names, inputs)

        fake = types.SimpleNamespace(
            InferenceSession=Session,
            SessionOptions=onnxruntime.SessionOptions,
            get_available_providers=lambda: ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"],
        )
        monkeypatch.setitem(sys.modules, "onnxruntime", fake)


def test_onnx_runtimes_tensorrt_keeps_its_engines(bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    provider, bundle = TensorRTProvider(monkeypatch), Bundle.load(bundle_path)
    before = set(bundle_path.rglob("*"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for spec in (QUERY_ENCODER, VISION_ENCODER):
        assert bundle.session(spec, provider="ort-tensorrt").provider == "ort-tensorrt"
    query, vision = provider.options
    folder = tmp_path / "cache" / "dqe-engine" / "ort-tensorrt" / bundle.manifest.graph_hash(QUERY_ENCODER)[:32]
    assert query == {
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(folder),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(folder),
        "trt_profile_min_shapes": "image_tokens:1x16x12,input_ids:1x2,attention_mask:1x2",
        "trt_profile_opt_shapes": "image_tokens:8x16x12,input_ids:8x16,attention_mask:8x16",
        "trt_profile_max_shapes": "image_tokens:32x16x12,input_ids:32x16,attention_mask:32x16",
    }  # float16 by a provider's option would round what a float16 graph keeps in float32
    assert vision["trt_profile_max_shapes"] == "pixel_values:32x3x32x32"
    assert vision["trt_engine_cache_path"] != query["trt_engine_cache_path"]  # its files are not named after the weights
    assert {stat.S_IMODE(path.stat().st_mode) for path in (folder, folder.parent, folder.parent.parent)} == {0o700}
    assert set(bundle_path.rglob("*")) == before


def test_batches_beyond_the_profile_run_in_parts(bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    provider = TensorRTProvider(monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    session = Bundle.load(bundle_path).session(QUERY_ENCODER, provider="ort-tensorrt")
    inputs = query_inputs(70)
    found = session.run(**inputs)
    assert provider.batches == [24, 23, 23]
    alone = [session.run(**{name: array[i : i + 1] for name, array in inputs.items()}) for i in (0, 23, 24, 69)]
    for name, array in found.items():
        np.testing.assert_allclose(array[[0, 23, 24, 69]], np.concatenate([one[name] for one in alone]), rtol=0, atol=1e-6)


def test_a_graph_of_which_tensorrt_takes_parts_has_no_profile(bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A profile must name every input of each part, and what lies between parts has no name that we know."""
    provider = TensorRTProvider(monkeypatch, takes_parts=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert Bundle.load(bundle_path).session(VISION_ENCODER, provider="ort-tensorrt").provider == "ort-tensorrt"
    assert [set(options) - set(provider.options[1]) for options in provider.options] == [
        {"trt_profile_min_shapes", "trt_profile_opt_shapes", "trt_profile_max_shapes"}, set(),
    ]  # fmt: skip


def test_where_engines_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert engine_cache("a" * 64) == tmp_path / ".cache" / "dqe-engine" / "ort-tensorrt" / ("a" * 32)
    assert engine_cache("a" * 64) != engine_cache("b" * 64)


def test_a_cache_that_others_may_write_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    root = tmp_path / "dqe-engine"
    root.mkdir()
    root.chmod(0o777)
    with pytest.raises(BackendError, match="engines are machine code, and others may write here; remove it, or set XDG_CACHE_HOME"):
        engine_cache("a" * 64)
    root.rmdir()
    (tmp_path / "elsewhere").mkdir()
    root.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BackendError, match="machine code"):
        engine_cache("a" * 64)
    root.unlink()
    root.write_text("a file")
    with pytest.raises(BackendError, match=r"no cache for engines: .*dqe-engine: file exists.*, or set XDG_CACHE_HOME"):
        engine_cache("a" * 64)


@pytest.mark.parametrize("provider", ["cuda", "ort-tensorrt"])
def test_a_provider_that_is_listed_but_runs_nothing(bundle_path: Path, monkeypatch: pytest.MonkeyPatch, provider: Any) -> None:
    listing_onnxruntime(monkeypatch, "TensorrtExecutionProvider", ["CPUExecutionProvider"])
    path = bundle_path / VISION_ENCODER.file
    with pytest.raises(BackendError, match="and gave it no node of the graph"):
        OnnxSession(path, VISION_ENCODER, SIZES, provider=provider)
    assert OnnxSession(path, VISION_ENCODER, SIZES, provider="auto").provider == "cpu"


@pytest.mark.parametrize("module", [None, types.ModuleType("onnxruntime")])
def test_missing_or_broken_onnxruntime(bundle_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", module)
    with pytest.raises(BackendError, match="exactly one of onnxruntime and onnxruntime-gpu"):
        OnnxSession(bundle_path / VISION_ENCODER.file, VISION_ENCODER, SIZES)
