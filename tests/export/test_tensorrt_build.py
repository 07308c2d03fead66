"""TensorRT engines of a bundle: planned, built, checked and written, with a fake builder that fails in every way we know of."""

from __future__ import annotations

import errno
import json
import sys
import tempfile
from pathlib import Path

import onnx
import pytest
import torch
from support.fake_cuda import FakeCuda, cudaError_t
from support.fake_tensorrt import FakeTensorRT
from support.nvinfer.abi import raise_what_a_callback_raises
from support.replayed_export import replay
from support.tiny_bundle import write_manifest

from dqe_engine.bundle import Bundle
from dqe_engine.contracts.engines import ENGINES_FILE
from dqe_engine.contracts.graphs import GRAPHS, QUERY_ENCODER, TARGET_ENCODER
from dqe_engine.engine import RetrievalEngine
from dqe_engine.tensorrt.engines import read_sidecar
from dqe_export.cli.export import main

pytestmark = raise_what_a_callback_raises

SMALL = "--trt-profile=batch=1:2:3,text_length=2:4:8"


@pytest.fixture(autouse=True)
def logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where failed builds leave their logs."""
    (tmp_path / "logs").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "logs"))


def folder_of(bundle: Path, trt: FakeTensorRT) -> Path:
    return bundle / "tensorrt" / f"fake-gpu-sm90-{'.'.join(trt.version.split('.')[:2])}"


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
    sizes = [(shape["batch"], shape["text_length"]) for shape in query.parity.shapes]
    profiles, captured = [(1, 2), (2, 4), (3, 8), (1, 7), (4, 2), (5, 4), (6, 8), (4, 7)], [(2, 8), (5, 8)]
    assert sizes == [*profiles, *captured]
    assert manifest.engines[0].parity.shapes == tuple({"batch": batch} for batch in (1, 2, 3, 4, 5, 6))
    assert [(shape["batch"], shape["text_length"]) for shape in query.graph_shapes] == [(2, 4), (2, 8), (5, 4), (5, 8)]
    assert query.tolerance == Bundle.load(bundle).manifest.tolerance
    assert set(query.parity.outputs) == {tensor.name for tensor in QUERY_ENCODER.outputs}
    header = json.loads((folder / "query_encoder.engine").read_bytes().partition(b"\n")[0])
    assert (header["tf32"], header["level"], header["workspace"]) == (False, 4, 2**29)
    log = (folder / "build.log").read_text()
    assert str(bundle) not in log
    assert [line for line in log.splitlines() if line.startswith("==")] == [f"== {spec.name}" for spec in GRAPHS]
    assert "query_encoder    from ONNX Runtime: max error" in capsys.readouterr().out
    assert Bundle.load(bundle).model_hash == identity
    assert set(RetrievalEngine.load(bundle).providers.values()) == {"tensorrt"}
    strong = 1 << (1 if trt.version.startswith("10.") else 0)  # the enum was renumbered
    assert trt.faults.network_flags == [strong] * len(GRAPHS)


def test_graphs_for_cpus_are_built_from_with_a_note(bundle: Path, trt: FakeTensorRT, capsys: pytest.CaptureFixture[str]) -> None:
    assert build(bundle) == 0
    assert f"note: {bundle} has graphs for CPUs; export with --trt or --target cuda" in capsys.readouterr().err
    path = bundle / "manifest.json"
    path.write_text(path.read_text().replace('"target":"cpu"', '"target":"cuda"').replace('"target": "cpu"', '"target": "cuda"'))
    assert build(bundle, "--force") == 0
    assert "for CPUs" not in capsys.readouterr().err


def test_compatible_engines_have_folders_of_their_own(bundle: Path, trt: FakeTensorRT, cuda: FakeCuda) -> None:
    assert build(bundle) == build(bundle, "--hardware-compatible", "--version-compatible", "--tf32") == 0
    names = sorted(path.name for path in (bundle / "tensorrt").iterdir())
    version = ".".join(trt.version.split(".")[:2])
    assert names == [f"fake-gpu-sm90-{version}", f"sm80+-{version}+"]
    header = json.loads((bundle / "tensorrt" / names[1] / "query_encoder.engine").read_bytes().partition(b"\n")[0])
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
    (folder / "timing.cache").write_bytes(b"timings that the builder refuses, of another driver, say")
    assert build(bundle, "--force") == 0  # nobody asked for them: it measures anew
    assert (folder / "timing.cache").read_bytes() == trt.cache()
    sidecar = folder / ENGINES_FILE
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


def test_a_timing_cache_that_cannot_be_written_is_a_failed_build(
    bundle: Path, trt: FakeTensorRT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr("dqe_export.tensorrt.engines.atomic_write", full)
    before = files(bundle)
    assert build(bundle, "--timing-cache", str(tmp_path / "kernels.cache")) == 2
    assert "kernels.cache: no space left on device" in capsys.readouterr().err
    assert files(bundle) == before


def test_a_timing_cache_that_cannot_be_read_is_told_by_the_plan_too(
    bundle: Path, trt: FakeTensorRT, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for options in ((), ("--dry-run",)):
        assert build(bundle, "--timing-cache", str(tmp_path), *options) == 2
        assert f"timing cache {tmp_path}: is a directory" in capsys.readouterr().err
    assert trt.created == []


def test_a_log_that_cannot_be_written_does_not_hide_the_failure(
    bundle: Path, trt: FakeTensorRT, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    trt.faults.build = "Error Code 10: Internal Error"
    monkeypatch.setattr(tempfile, "NamedTemporaryFile", full)
    assert build(bundle) == 2
    assert "vision_encoder: TensorRT built no engine: Error Code 10: Internal Error" in capsys.readouterr().err


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
    error = capsys.readouterr().err
    assert "vision_encoder: image_tokens differs from ONNX Runtime by" in error
    log = Path(error.split("TensorRT's log: ")[1].strip())
    assert "[INFO] building" in log.read_text()
    assert {name: (bundle / name).read_bytes() for name in files(bundle) if (bundle / name).is_file()} == before


@pytest.mark.parametrize("said", ['{"Layers": [{"LayerType": "gemm\x01"}]}', "{", "[]", '{"Layers": 3}', None])
def test_a_description_that_cannot_be_read_costs_no_engine(bundle: Path, trt: FakeTensorRT, said: str | None) -> None:
    trt.faults.inspection, trt.faults.inspection_missing = said, said is None
    assert build(bundle) == 0
    types = read_sidecar(folder_of(bundle, trt)).engines[0].layer_types
    assert list(types) == (["gemm\x01"] if said and "gemm" in said else ["unknown"])
    assert sum(types.values()) >= 1


def test_the_log_keeps_its_end_and_each_graph_its_own(bundle: Path, trt: FakeTensorRT) -> None:
    trt.faults.log_lines = 6000
    assert build(bundle) == 0
    log = (folder_of(bundle, trt) / "build.log").read_text().splitlines()
    assert log.count("[INFO] line 5999") == len(GRAPHS)
    assert "[INFO] line 0" not in log


def test_a_device_that_records_no_graphs(bundle: Path, trt: FakeTensorRT, cuda: FakeCuda) -> None:
    cuda.fail["cudaGraphInstantiate"] = cudaError_t.cudaErrorMemoryAllocation
    assert build(bundle) == 0
    assert all(engine.graph_shapes == () for engine in read_sidecar(folder_of(bundle, trt)).engines)


def test_profiles_that_differ_in_texts_alone_are_one_for_images(bundle: Path, trt: FakeTensorRT) -> None:
    assert build(bundle, SMALL.replace("text_length=2:4:8", "text_length=2:5:8")) == 0
    vision, query = read_sidecar(folder_of(bundle, trt)).engines[:2]
    assert vision.graph_shapes == ({"batch": 2},)
    assert [(shape["batch"], shape["text_length"]) for shape in query.graph_shapes] == [(2, 4), (2, 8)]


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
    assert max(shape["text_length"] for shape in read_sidecar(folder_of(out, trt)).engines[1].parity.shapes) == length
    assert set(RetrievalEngine.load(out).providers.values()) == {"tensorrt"}
