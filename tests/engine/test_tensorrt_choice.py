"""Engines of a bundle are found where they fit the device and the release, and refused with the reason where they do not."""

from __future__ import annotations

import builtins
import errno
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.fake_cuda import FakeCuda
from support.fake_tensorrt import VERSION, FakeTensorRT
from support.nvinfer.abi import raise_what_a_callback_raises
from support.tiny_engines import HERE, MAJOR, NEXT

from dqe_engine.bundle import Bundle
from dqe_engine.contracts.engines import ENGINES_FILE
from dqe_engine.contracts.graphs import ATTRIBUTE_HEADS, GRAPHS, TARGET_ENCODER, VISION_ENCODER
from dqe_engine.engine import RetrievalEngine
from dqe_engine.errors import BackendError, BundleError, InputError

pytestmark = raise_what_a_callback_raises


def test_a_bundle_runs_on_its_engines(with_engines: Callable[..., Path]) -> None:
    bundle = with_engines()
    for provider in ("tensorrt", "auto"):
        engine = RetrievalEngine.load(bundle, provider=provider)
        assert set(engine.providers.values()) == {"tensorrt"}
    assert Bundle.load(bundle).model_hash == Bundle.load(bundle).manifest.model_hash


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        ({"capability": "8.0"}, f"fake-gpu-sm80-{HERE} (built for compute capability 8.0)"),
        ({"gpu": "Fake GPU (PCIe)"}, f"fake-gpu-pcie-sm90-{HERE} (built on Fake GPU (PCIe))"),
        ({"version": f"{MAJOR}.0.0.99"}, f"fake-gpu-sm90-{MAJOR}.0 (built with TensorRT {MAJOR}.0.0.99)"),
        ({"version": f"{HERE}.9.0"}, f"fake-gpu-sm90-{HERE} (built with TensorRT {HERE}.9.0)"),
        ({"version": f"{NEXT}.0.1", "vc": True}, f"fake-gpu-sm90-{NEXT}+ (built with TensorRT {NEXT}.0.1, which is newer)"),
        ({"vision_encoder": "0" * 32}, f"fake-gpu-sm90-{HERE} (vision_encoder was built from another export)"),
    ],
)
def test_engines_for_elsewhere_are_refused_and_auto_goes_on(with_engines: Callable[..., Path], made: dict[str, Any], reason: str) -> None:
    bundle = Bundle.load(with_engines(**made))
    refused = f"no TensorRT engine for Fake GPU (compute capability 9.0) and TensorRT {VERSION}; it has {reason}"
    with pytest.raises(BackendError, match=re.escape(refused)):
        bundle.session(VISION_ENCODER, provider="tensorrt")
    assert bundle.session(VISION_ENCODER, provider="auto").provider == "cpu"


def test_engines_outlive_the_replacement_of_another_graph(with_engines: Callable[..., Path]) -> None:
    engine = RetrievalEngine.load(with_engines(attribute_heads="0" * 32))
    assert engine.providers == {spec.name: "cpu" if spec is ATTRIBUTE_HEADS else "tensorrt" for spec in GRAPHS}


def test_compatible_engines_run_elsewhere_and_fitting_ones_come_first(with_engines: Callable[..., Path], cuda: FakeCuda) -> None:
    bundle = Bundle.load(with_engines("10.3.0.26", "8.6", gpu="Another GPU", vc=True, hc=True))
    assert bundle.session(TARGET_ENCODER, provider="tensorrt").provider == "tensorrt"
    cuda.capability = (7, 5)
    with pytest.raises(BackendError, match=r"hardware-compatible engines need compute capability 8\.0 or newer"):
        bundle.session(TARGET_ENCODER, provider="tensorrt")
    cuda.capability = (9, 0)
    with_engines()
    (bundle.path / "tensorrt" / "sm80+-10.3+" / "target_encoder.engine").unlink()  # no longer looked at
    assert bundle.session(TARGET_ENCODER, provider="tensorrt").provider == "tensorrt"


def test_the_command_lines_offer_every_provider() -> None:
    from dqe_engine.cli import main
    from dqe_engine.sessions import PROVIDERS

    assert main._PROVIDERS == PROVIDERS


def test_no_engines_at_all(trt: FakeTensorRT, bundle_path: Path) -> None:
    with pytest.raises(BackendError, match=r"it has none at all; build on this machine with: dqe-export --trt --bundle"):
        Bundle.load(bundle_path).session(VISION_ENCODER, provider="tensorrt")
    with pytest.raises(InputError, match="unknown provider 'gpu'; choose auto, cpu, cuda, tensorrt, ort-tensorrt"):
        Bundle.load(bundle_path).session(VISION_ENCODER, provider="gpu")  # type: ignore[arg-type]


def test_damaged_engines_are_an_error_for_auto_too(with_engines: Callable[..., Path]) -> None:
    bundle = Bundle.load(with_engines())
    folder = bundle.path / "tensorrt" / f"fake-gpu-sm90-{HERE}"
    sidecar, engine = folder / ENGINES_FILE, folder / "vision_encoder.engine"
    whole, text = engine.read_bytes(), sidecar.read_text()
    for change, message in (
        (lambda: engine.write_bytes(whole[:-1] + b"\0"), "SHA-256 differs"),
        (engine.unlink, "missing; build the engines again"),
        (lambda: sidecar.write_text(text.replace('"vision_encoder.engine"', '"../vision_encoder.engine"')), "not a plain file name"),
        (lambda: sidecar.write_text(text.replace('"graph": "vision_encoder"', '"graph": "other"')), "no engine for vision_encoder"),
        (lambda: sidecar.write_text("{"), "not valid JSON"),
    ):
        change()
        for provider in ("tensorrt", "auto"):
            with pytest.raises(BundleError, match=message):
                bundle.session(VISION_ENCODER, provider=provider)
        engine.write_bytes(whole)
        sidecar.write_text(text)


def test_engines_of_another_release_are_refused_and_do_not_hide_others(with_engines: Callable[..., Path]) -> None:
    bundle = Bundle.load(with_engines())
    other = bundle.path / "tensorrt" / "another"
    shutil.copytree(bundle.path / "tensorrt" / f"fake-gpu-sm90-{HERE}", other)
    (other / ENGINES_FILE).write_text('{"schema_version": 2, "engines": [], "fields": "that this release does not know"}')
    assert bundle.session(VISION_ENCODER, provider="auto").provider == "tensorrt"
    shutil.rmtree(bundle.path / "tensorrt" / f"fake-gpu-sm90-{HERE}")
    with pytest.raises(BackendError, match=r"it has another \(built with another release of dqe-engine\); build on this machine"):
        bundle.session(VISION_ENCODER, provider="tensorrt")
    assert bundle.session(VISION_ENCODER, provider="auto").provider == "cpu"


def test_an_engine_that_may_not_be_read(with_engines: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, read = Bundle.load(with_engines()), Path.read_bytes

    def refuse(path: Path) -> bytes:
        if path.suffix == ".engine":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(BundleError, match=r"vision_encoder\.engine: permission denied; grant this user access"):
        bundle.session(VISION_ENCODER, provider="auto")


@pytest.mark.parametrize("module", ["tensorrt", "cuda.bindings"])
@pytest.mark.parametrize(
    "error", [OSError("libnvinfer.so"), RuntimeError("no library"), ValueError("size changed"), AttributeError("_ARRAY_API")]
)
def test_auto_goes_on_where_an_import_fails_in_any_way(
    with_engines: Callable[..., Path], module: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, load = Bundle.load(with_engines()), builtins.__import__

    def refuse(name: str, *arguments: Any, **options: Any) -> Any:
        if name == module:
            raise error
        return load(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(BackendError, match=f"{module} cannot be imported .{error}.; pip install"):
        bundle.session(VISION_ENCODER, provider="tensorrt")
    assert bundle.session(VISION_ENCODER, provider="auto").provider == "cpu"


def test_auto_goes_on_where_the_bindings_raise(with_engines: Callable[..., Path], cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.load(with_engines())

    def missing() -> None:
        raise RuntimeError('Function "cudaGetDeviceCount" not found')

    monkeypatch.setattr(cuda, "cudaGetDeviceCount", missing)
    with pytest.raises(BackendError, match=r'no usable CUDA device \(cudaGetDeviceCount: Function "cudaGetDeviceCount" not found\)'):
        bundle.session(VISION_ENCODER, provider="tensorrt")
    assert bundle.session(VISION_ENCODER, provider="auto").provider == "cpu"
