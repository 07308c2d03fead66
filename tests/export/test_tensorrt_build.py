"""TensorRT engines of a bundle: planned, built, checked and written, with a fake builder that fails in every way we know of."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from support.fake_cuda import FakeCuda, cudaError_t
from support.fake_tensorrt import FakeTensorRT
from support.replayed_export import replay
from support.tiny_bundle import SIZES, build_tiny_bundle, write_manifest

from dqe_engine.bundle import Bundle
from dqe_engine.contracts.engines import ENGINES_FILE
from dqe_engine.contracts.graphs import GRAPHS, TARGET_ENCODER
from dqe_engine.engine import RetrievalEngine
from dqe_engine.tensorrt.engines import read_sidecar
from dqe_export.cli.export import main
from dqe_export.tensorrt.check import TOLERANCES, EngineMismatchError, check_engine
from dqe_export.tensorrt.plan import parse_profile

SMALL = "--trt-profile=batch=1:2:3,text_length=2:4:8"


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return build_tiny_bundle(tmp_path / "bundle")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return FakeCuda().install(monkeypatch)


@pytest.fixture(params=["10.16.1.11", "11.4.0.106"])
def trt(request: pytest.FixtureRequest, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
    return FakeTensorRT(cuda, request.param).install(monkeypatch)


def folder_of(bundle: Path, trt: FakeTensorRT) -> Path:
    return bundle / "tensorrt" / f"sm90-{'.'.join(trt.version.split('.')[:2])}"


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def build(bundle: Path, *options: str) -> int:
    return main(["--trt", "--bundle", str(bundle), SMALL, *options])


# -- the build ------------------------------------------------------------------------------------------------------------


def test_engines_are_built_checked_and_described(bundle: Path, trt: FakeTensorRT, capsys: pytest.CaptureFixture[str]) -> None:
    identity = Bundle.load(bundle).model_hash
    assert build(bundle, SMALL.replace("1:2:3", "4:5:6"), "--workspace", "0.5", "--optimization-level", "4") == 0
    folder = folder_of(bundle, trt)
    assert files(folder) == {ENGINES_FILE, "build.log", "timing.cache", *(f"{spec.name}.engine" for spec in GRAPHS)}
    manifest = read_sidecar(folder)
    assert (manifest.gpu, manifest.compute_capability, manifest.tensorrt) == ("Fake GPU", "9.0", trt.version)
    assert (manifest.cuda_driver, manifest.precision) == ("13.1", "float32")
    assert (manifest.workspace, manifest.optimization_level, manifest.tf32) == (2**29, 4, False)
    query = manifest.engines[1]
    assert query.layer_types["MatMul"] == 3
    assert query.layers == sum(query.layer_types.values())
    sizes = [(p.shape["batch"], p.shape["text_length"]) for p in query.parity]
    assert sizes == [(1, 2), (2, 4), (3, 8), (4, 2), (5, 4), (6, 8)]
    assert [p.shape for p in manifest.engines[0].parity] == [{"batch": batch} for batch in (1, 2, 3, 4, 5, 6)]
    assert query.graph_shapes == ({"batch": 2, "text_length": 4}, {"batch": 5, "text_length": 4})
    header = json.loads((folder / "query_encoder.engine").read_bytes().partition(b"\n")[0])
    assert (header["tf32"], header["level"], header["workspace"]) == (False, 4, 2**29)
    assert str(bundle) not in (folder / "build.log").read_text()
    assert "max abs difference from ONNX Runtime" in capsys.readouterr().out
    assert Bundle.load(bundle).model_hash == identity
    assert set(RetrievalEngine.load(bundle).providers.values()) == {"tensorrt"}
    strong = 1 << (1 if trt.version.startswith("10.") else 0)  # the enum was renumbered
    assert trt.faults.network_flags == [strong] * len(GRAPHS)


def test_compatible_engines_have_folders_of_their_own(bundle: Path, trt: FakeTensorRT, cuda: FakeCuda) -> None:
    assert build(bundle) == build(bundle, "--hardware-compatible", "--version-compatible", "--tf32") == 0
    names = sorted(path.name for path in (bundle / "tensorrt").iterdir())
    version = ".".join(trt.version.split(".")[:2])
    assert names == [f"sm80+-{version}+", f"sm90-{version}"]
    header = json.loads((bundle / "tensorrt" / names[0] / "query_encoder.engine").read_bytes().partition(b"\n")[0])
    assert (header["hc"], header["vc"], header["tf32"]) == (True, True, True)
    cuda.capability = (7, 5)
    assert build(bundle, "--hardware-compatible") == 2


def test_existing_engines_need_force_and_lend_their_timings(bundle: Path, trt: FakeTensorRT, capsys: pytest.CaptureFixture[str]) -> None:
    assert build(bundle) == 0
    folder = folder_of(bundle, trt)
    assert (folder / "timing.cache").read_bytes() == trt.cache()
    assert build(bundle) == 2
    assert "exists already; replace these engines with --force" in capsys.readouterr().err
    assert build(bundle, "--force", "--optimization-level", "0") == 0  # level 0 measures nothing
    assert (folder / "timing.cache").read_bytes() == trt.cache()
    (folder / "timing.cache").write_bytes(b"timings of another GPU of this architecture")
    assert build(bundle, "--force") == 2  # the sidecar says this GPU's
    sidecar = folder / ENGINES_FILE
    sidecar.write_text(sidecar.read_text().replace('"Fake GPU"', '"Another GPU"'))
    assert build(bundle, "--force") == 0  # so it is not read
    sidecar.write_text("damaged")
    assert build(bundle, "--force") == 0


def test_a_named_timing_cache_is_read_and_written(
    bundle: Path, trt: FakeTensorRT, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "kernels.cache"
    assert build(bundle, "--timing-cache", str(cache)) == 0
    assert cache.read_bytes() == trt.cache()
    cache.write_bytes(b"timings of another GPU")
    before = files(bundle)
    assert build(bundle, "--timing-cache", str(cache), "--force") == 2
    assert f"the timing cache was made on another GPU or by another TensorRT than {trt.version}" in capsys.readouterr().err
    assert files(bundle) == before


def _spoil(bundle: Path, operator: str) -> None:
    """Put a node that nothing reads into the target encoder."""
    model = onnx.load(bundle / TARGET_ENCODER.file)
    model.graph.node.append(onnx.helper.make_node(operator, ["w"], ["unused"], name="spoiled"))
    onnx.save(model, bundle / TARGET_ENCODER.file)
    write_manifest(bundle)


@pytest.mark.parametrize(
    ("operator", "message"),
    [
        ("Unique", "has no operator Unique as this graph uses it; export the bundle in another precision"),
        ("Invalid", "cannot parse the graph: Invalid spoiled: assertion failed"),
    ],
)
def test_graphs_that_do_not_parse(bundle: Path, trt: FakeTensorRT, operator: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    _spoil(bundle, operator)
    trt.faults.unsupported.add("Unique")
    before = files(bundle)
    assert build(bundle) == 2
    error = capsys.readouterr().err
    assert f"target_encoder: TensorRT {trt.version} {message}" in error
    assert files(bundle) == before  # the two engines before it are gone too


@pytest.mark.parametrize(
    ("logged", "remedy"),
    [
        ("Error Code 2: OutOfMemory (Requested size was 10 bytes.)", "free memory on the device, or build for smaller batches"),
        ("Could not find any implementation due to insufficient workspace", "allow more with --workspace"),
        ("Error Code 10: Internal Error", "try another --optimization-level"),
    ],
)
def test_builds_that_fail(bundle: Path, trt: FakeTensorRT, logged: str, remedy: str, capsys: pytest.CaptureFixture[str]) -> None:
    trt.faults.build = logged
    before = files(bundle)
    assert build(bundle) == 2
    error = capsys.readouterr().err
    assert f"vision_encoder: TensorRT built no engine: {logged}; {remedy}" in error
    assert files(bundle) == before


def test_a_device_without_room_for_the_engine(bundle: Path, trt: FakeTensorRT, cuda: FakeCuda) -> None:
    cuda.fail["cudaMalloc"] = cudaError_t.cudaErrorMemoryAllocation
    before = files(bundle)
    assert build(bundle) == 2
    assert files(bundle) == before


def test_no_gpu_and_no_tensorrt(bundle: Path, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    for devices, message in ((1, "tensorrt cannot be imported"), (0, "no usable CUDA device")):
        cuda.devices = devices
        for arguments in (["--trt", "--bundle", str(bundle)], ["absent", str(bundle / "new"), "--trt"]):
            assert main(arguments) == 2  # for an export: before it has begun
            assert message in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [0.01, float("nan")])
def test_an_engine_that_differs_is_removed(bundle: Path, trt: FakeTensorRT, wrong: float, capsys: pytest.CaptureFixture[str]) -> None:
    assert build(bundle) == 0
    before = {name: (bundle / name).read_bytes() for name in files(bundle) if (bundle / name).is_file()}
    trt.faults.error = wrong
    assert build(bundle, "--force") == 1  # a failed gate, not a mistake of the user's
    assert "vision_encoder: image_tokens differs from ONNX Runtime by" in capsys.readouterr().err
    assert {name: (bundle / name).read_bytes() for name in files(bundle) if (bundle / name).is_file()} == before


def test_an_interrupted_build_leaves_the_bundle(bundle: Path, trt: FakeTensorRT, monkeypatch: pytest.MonkeyPatch) -> None:
    before = files(bundle)

    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dqe_export.tensorrt.engines.check_engine", interrupt)
    assert build(bundle) == 130
    assert files(bundle) == before


@pytest.mark.usefixtures("one_thread")
def test_export_and_engines_in_one_go(
    checkpoint_path: Path, bundle_path: Path, tmp_path: Path, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    trt = FakeTensorRT(cuda).install(monkeypatch)
    monkeypatch.setattr(torch.onnx, "export", replay(bundle_path))
    out, length = tmp_path / "new", Bundle.load(bundle_path).manifest.tokenizer.max_length
    arguments = [str(checkpoint_path), str(out), "--trt"]
    assert main([*arguments, "--trt-profile", f"text_length=2:4:{length + 1}"]) == 2
    assert not out.exists()  # told before the export
    assert main([*arguments, "--dry-run"]) == 0
    assert "--maxShapes=pixel_values:32x3x" in capsys.readouterr().out
    assert not out.exists()
    assert main([*arguments, "--trt-profile", "batch=1:2:3"]) == 0
    assert Bundle.load(out).manifest.precision == "float16"
    assert [max(p.shape["text_length"] for p in e.parity) for e in read_sidecar(folder_of(out, trt)).engines[1:2]] == [length]
    assert set(RetrievalEngine.load(out).providers.values()) == {"tensorrt"}


# -- the check ------------------------------------------------------------------------------------------------------------


class _Scaled:
    """A session whose outputs are `factor` times another's, and off by `offset` in one element."""

    provider, spec = "test", TARGET_ENCODER

    def __init__(self, bundle: Path, factor: float = 1, offset: float = 0) -> None:
        self.session, self.factor, self.offset = Bundle.load(bundle).session(TARGET_ENCODER, provider="cpu", threads=1), factor, offset

    def run(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        outputs = {name: (array * self.factor).astype(np.float32) for name, array in self.session.run(**inputs).items()}
        outputs["target_tokens"].flat[-1] += self.offset
        return outputs


@pytest.mark.parametrize("precision", TOLERANCES)
def test_each_precision_has_a_tolerance_that_bites(bundle: Path, precision: str) -> None:
    atol, rtol = TOLERANCES[precision]

    def check(factor: float, offset: float) -> float:
        parity = check_engine(
            TARGET_ENCODER, SIZES, _Scaled(bundle, factor, offset), _Scaled(bundle), [parse_profile("batch=1:2:3", 16)],
            vocab_size=20, precision=precision,
        )  # fmt: skip
        return max(error for p in parity for error in p.max_abs_error.values())

    assert check(1 + rtol / 2, atol / 2) > 0
    for factor, offset in ((1, 3 * (atol + rtol)), (1 + 4 * (rtol + atol), 0), (1, float("nan"))):
        with pytest.raises(EngineMismatchError, match="target_tokens differs from ONNX Runtime"):
            check(factor, offset)
