"""What is to be built, and what is refused before anything is: profiles, the plan and the arguments. Needs neither TensorRT nor a GPU."""

from __future__ import annotations

import json
import re
import shlex
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from support.fake_cuda import FakeCuda
from support.samples import noise_image
from support.tiny_bundle import SIZES, write_manifest

from dqe_engine.bundle import Bundle
from dqe_engine.contracts.engines import AxisRange
from dqe_engine.contracts.graphs import ATTRIBUTE_HEADS, GRAPHS, QUERY_ENCODER, TARGET_ENCODER, VISION_ENCODER
from dqe_engine.contracts.manifest import MANIFEST_FILE
from dqe_engine.engine import RetrievalEngine
from dqe_engine.errors import InputError
from dqe_engine.query import Query
from dqe_engine.sessions import OnnxSession
from dqe_export.bundle import ExportOptions
from dqe_export.calibration import EvaluationData
from dqe_export.cli.export import build_parser, main
from dqe_export.cli.export_choices import choices, resolve_target
from dqe_export.tensorrt.plan import (
    BuildOptions,
    default_profiles,
    distinct_profiles,
    lengths_left_out,
    parse_profile,
    traffic_profile,
    trtexec_line,
)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """A device, and a TensorRT of which only the version is asked."""
    module: Any = types.ModuleType("tensorrt")
    module.__version__ = "10.16.1.11"
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    return FakeCuda().install(monkeypatch)


@pytest.fixture
def no_build(monkeypatch: pytest.MonkeyPatch) -> None:
    def begun(*arguments: object, **options: object) -> None:
        raise AssertionError("what cannot be built was begun")

    monkeypatch.setattr("dqe_export.tensorrt.engines.build_engines", begun)
    monkeypatch.setattr("dqe_export.bundle.export_bundle", begun)


# -- profiles ---------------------------------------------------------------------------------------------------------------


def test_profiles_from_options() -> None:
    profile = parse_profile("batch=1:4:32", 64)
    assert (profile.batch, profile.text_length) == (AxisRange(min=1, opt=4, max=32), AxisRange(min=2, opt=16, max=64))
    assert parse_profile("text_length=3:5:9, batch=2:2:2", 64).text_length == AxisRange(min=3, opt=5, max=9)
    assert {profile.text_length for profile in default_profiles(6)} == {AxisRange(min=2, opt=6, max=6)}


def test_one_query_and_batches_have_profiles_of_their_own() -> None:
    """Together they take every batch from 1 on: `TensorRTSession` runs larger ones in parts, none of which may be of one."""
    one, batches = default_profiles(64)
    assert one.batch == AxisRange(min=1, opt=1, max=1)
    assert batches.batch == AxisRange(min=2, opt=8, max=32)
    assert one.text_length == batches.text_length == AxisRange(min=2, opt=16, max=64)


def test_profiles_that_differ_in_texts_alone_are_one_without_texts() -> None:
    profiles = [parse_profile(text, 64) for text in ("batch=1:1:1", "batch=1:1:1,text_length=2:8:8", "batch=2:8:32", "batch=2:8:32")]
    assert distinct_profiles(VISION_ENCODER, profiles) == distinct_profiles(TARGET_ENCODER, profiles) == (profiles[0], profiles[2])
    assert distinct_profiles(QUERY_ENCODER, profiles) == distinct_profiles(ATTRIBUTE_HEADS, profiles) == tuple(profiles[:3])
    line = trtexec_line(VISION_ENCODER, SIZES, BuildOptions(profiles=tuple(profiles[:2])), onnx=Path("v.onnx"), engine=Path("v.engine"))
    assert line.count("--maxShapes") == 1
    assert "--profile=" not in line


@pytest.mark.parametrize(
    ("texts", "left_out"),
    [
        (["batch=1:1:1"], []),
        (["batch=2:8:32"], [2, 3, 4, 5, 6, 7, 8]),
        (["text_length=3:4:5"], [2, 6, 7, 8]),
        (["batch=1:1:1,text_length=2:4:4", "batch=2:8:32", "batch=1:2:2,text_length=6:8:8"], [5]),
    ],
)
def test_one_query_that_fits_no_profile(bundle: Path, texts: list[str], left_out: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    assert lengths_left_out([parse_profile(text, 8) for text in texts], 8) == left_out
    assert plan(bundle, *(f"--trt-profile={text}" for text in texts)) == 0
    assert ("note: one query with some text of" in capsys.readouterr().err) == bool(left_out)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batch=1:4", "batch takes three whole numbers MIN:OPT:MAX, got '1:4'"),
        ("batch=1:4:x", "batch takes three whole numbers"),
        ("batch=0:4:8", "expected 1 <= min <= opt <= max, got 0:4:8"),
        ("batch=5:4:8", "expected 1 <= min <= opt <= max, got 5:4:8"),
        ("width=1:2:3", "expected batch=MIN:OPT:MAX"),
        ("batch=1:2:3,batch=1:2:3", "each once"),
        ("text_length=1:4:8", "texts have 2 to 64 tokens"),
        ("text_length=2:4:65", "texts have 2 to 64 tokens"),
    ],
)
def test_profiles_that_are_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_profile(text, 64)


def test_profile_from_traffic(tmp_path: Path) -> None:
    requests = [(1, 7)] * 60 + [(4, 9)] * 39 + [(500, 31)]
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps({"batch": b, "text_length": n}) for b, n in requests) + "\n\n")
    profile = traffic_profile(tmp_path / "t.jsonl", 64)
    assert profile.batch == AxisRange(min=1, opt=1, max=4)  # the one batch of 500 will run in parts
    assert profile.text_length == AxisRange(min=2, opt=7, max=64)  # no text is refused because it did not come up


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no traffic in it"),
        ('{"batch": 1, "text_length": 4}\n{"batch": 1}', "line 2: Object missing required field `text_length`"),
        ('{"batch": 0, "text_length": 4}', "expected batch >= 1"),
        ('{"batch": 1, "text_length": 65}', "a text of 65 tokens, but this bundle cuts texts at 64"),
        ("batch 1", "line 1: not valid JSON"),
        (None, "no such file or directory; check the path"),
    ],
)
def test_traffic_that_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "t.jsonl").write_text(content)
    with pytest.raises(InputError, match=message):
        traffic_profile(tmp_path / "t.jsonl", 64)


def test_the_trtexec_line_says_everything() -> None:
    options = BuildOptions(
        profiles=(parse_profile("batch=1:1:1", 16), parse_profile("batch=2:8:32", 16)), workspace=2**31, timing_cache="t cache",
        optimization_level=5, hardware_compatible=True, version_compatible=True,
    )  # fmt: skip
    line = trtexec_line(QUERY_ENCODER, SIZES, options, onnx=Path("b/q.onnx"), engine=Path("b/q.engine"))
    assert shlex.split(line) == [
        "trtexec", "--onnx=b/q.onnx", "--saveEngine=b/q.engine", "--stronglyTyped", "--skipInference",
        "--profile=0", "--minShapes=image_tokens:1x16x12,input_ids:1x2,attention_mask:1x2",
        "--optShapes=image_tokens:1x16x12,input_ids:1x16,attention_mask:1x16",
        "--maxShapes=image_tokens:1x16x12,input_ids:1x16,attention_mask:1x16",
        "--profile=1", "--minShapes=image_tokens:2x16x12,input_ids:2x2,attention_mask:2x2",
        "--optShapes=image_tokens:8x16x12,input_ids:8x16,attention_mask:8x16",
        "--maxShapes=image_tokens:32x16x12,input_ids:32x16,attention_mask:32x16",
        "--builderOptimizationLevel=5", "--profilingVerbosity=detailed", "--memPoolSize=workspace:2147483648B",
        "--timingCacheFile=t cache", "--hardwareCompatibilityLevel=ampere+", "--versionCompatible", "--noTF32",
    ]  # fmt: skip


# -- the command line -------------------------------------------------------------------------------------------------------


def plan(bundle: Path, *options: str) -> int:
    return main(["--trt", "--dry-run", "--bundle", str(bundle), *options])


def files(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def test_dry_run_plans_and_writes_nothing(bundle: Path, gpu: FakeCuda, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(bundle)
    assert plan(bundle) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "precision   float32, as in the ONNX graphs" in lines
    assert f"engines     {bundle}/tensorrt/fake-gpu-sm90-10.16" in lines
    assert "profile 0   batch 1:1:1, text_length 2:16:16 (min:opt:max)" in lines
    assert "profile 1   batch 2:8:32, text_length 2:16:16 (min:opt:max)" in lines
    assert "graph       target_encoder: profiles 0, 1; float32, 3 nodes of 2 operators, none of which TensorRT is known to lack" in lines
    assert [line.split()[1] for line in lines if line.startswith("trtexec")] == [f"--onnx={bundle / spec.file}" for spec in GRAPHS]
    gpu.devices = 0
    assert plan(bundle) == 0
    shown = capsys.readouterr()
    assert "tensorrt/GPU-VERSION" in shown.out
    assert "note: nothing can be built here: no usable CUDA device" in shown.err
    assert files(bundle) == before


def test_dry_run_says_what_is_in_the_way(bundle: Path, gpu: FakeCuda, capsys: pytest.CaptureFixture[str]) -> None:
    (bundle / "tensorrt" / "fake-gpu-sm90-10.16").mkdir(parents=True)
    assert plan(bundle) == plan(bundle, "--force") == 0
    assert capsys.readouterr().err == f"note: {bundle}/tensorrt/fake-gpu-sm90-10.16 exists already; --force replaces it\n"


def rewrite(bundle: Path, edit: Callable[[onnx.ModelProto], None], **changes: object) -> None:
    """Change the target encoder by `edit`, and the manifest by `changes`."""
    model = onnx.load(bundle / TARGET_ENCODER.file)
    edit(model)
    onnx.save(model, bundle / TARGET_ENCODER.file)
    write_manifest(bundle)
    manifest = json.loads((bundle / MANIFEST_FILE).read_text())
    (bundle / MANIFEST_FILE).write_text(json.dumps(manifest | changes))


def add_node(model: onnx.ModelProto, operator: str, domain: str = "") -> None:
    model.graph.node.append(onnx.helper.make_node(operator, ["w"], ["unused"], name="added", domain=domain))


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a dry run and the build refuse `arguments` with, without having built anything."""
    said = []
    for options in (["--dry-run"], []):
        assert main([*arguments, *options]) == 2
        shown = capsys.readouterr()
        assert shown.out == ""
        assert shown.err.count("\n") == 1
        said.append(shown.err)
    assert said[0] == said[1]
    return said[0]


@pytest.mark.usefixtures("no_build")
def test_bundles_that_cannot_be_built_are_refused_at_once(bundle: Path, gpu: FakeCuda, capsys: pytest.CaptureFixture[str]) -> None:
    rewrite(bundle, lambda model: None, precision="int8")
    assert "multiplies whole numbers (MatMulInteger), which TensorRT has no operator for; export with --precision f16" in refused(
        capsys, "--trt", "--bundle", str(bundle)
    )
    for operator, domain, name in (("MatMulInteger", "", "MatMulInteger"), ("Gelu", "com.microsoft", "com.microsoft.Gelu")):
        rewrite(bundle, lambda model: add_node(model, operator, domain))  # noqa: B023
        assert f"target_encoder: TensorRT has no operator {name}" in refused(capsys, "--trt", "--bundle", str(bundle))
        rewrite(bundle, lambda model: model.graph.node.pop())
    gpu.capability = (7, 5)
    line = refused(capsys, "--trt", "--bundle", str(bundle), "--hardware-compatible")
    assert "--hardware-compatible needs compute capability 8.0 or newer, this has 7.5" in line
    assert "texts have 2 to 16 tokens" in refused(capsys, "--trt", "--bundle", str(bundle), "--trt-profile", "text_length=2:4:17")


@pytest.mark.usefixtures("gpu", "no_build")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--precision", "int8"], "multiplies whole numbers (MatMulInteger), which TensorRT has no operator for"),
        (["--precision", "int8-static"], "name an evaluation set with --data"),
        (["--trt-profile", "text_length=2:4:4000"], "texts have 2 to"),
        (["--precision", "auto", "--target", "cpu"], "--target cpu contradicts --trt"),
    ],
)
def test_exports_that_cannot_be_built_are_refused_before_they_begin(
    checkpoint_path: Path, tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(capsys, str(checkpoint_path), str(tmp_path / "out"), "--trt", *options)
    assert not (tmp_path / "out").exists()


def test_a_plan_before_there_is_a_bundle(checkpoint_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(checkpoint_path), str(tmp_path / "out"), "--trt", "--dry-run"]
    assert main(arguments) == main([*arguments, "--precision", "f32"]) == 0
    lines = capsys.readouterr().out.splitlines()
    default, chosen = (line for line in lines if line.startswith("precision"))
    assert default.startswith("precision   float16, the default with --trt, because")
    assert chosen == "precision   float32"
    assert "graph       vision_encoder: profiles 0, 1; float16, its operators are known after the export" in lines
    assert not (tmp_path / "out").exists()


def test_precisions_for_engines(garments: Path) -> None:
    """Never int8, which TensorRT does not take: whatever the target and the data."""

    def chosen(*options: str) -> list[str]:
        args = build_parser().parse_args(["checkpoint", "out", *options])
        data = EvaluationData.open(garments)
        return [precision for precision, _ in choices(args.precision, resolve_target(args), data, trt=args.trt)]

    assert chosen("--trt") == chosen("--trt", "--precision", "auto") == chosen("--trt", "--target", "cuda") == ["float16"]
    assert chosen("--trt", "--precision", "f32") == chosen() == chosen("--target", "cuda") == ["float32"]
    assert chosen("--precision", "auto") == ["int8", "float32"]


def test_the_reason_for_float16_is_said(
    checkpoint_path: Path, bundle_path: Path, tmp_path: Path, gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    seen: list[ExportOptions] = []
    manifest = Bundle.load(bundle_path).manifest
    monkeypatch.setattr("dqe_export.bundle.export_bundle", lambda _, out, options, **rest: seen.append(options) or manifest)
    monkeypatch.setattr("dqe_export.cli.tensorrt_options.build_for_bundle", lambda args, path: 0)
    assert main([str(checkpoint_path), str(tmp_path / "out"), "--trt"]) == 0
    assert [options.precision for options in seen] == ["float16"]
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "default with --trt" in line)
    assert "TF32 is off" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bundle", "b"], "--bundle goes with --trt"),
        (["checkpoint", "b", "--workspace", "2"], "--workspace goes with --trt"),
        (["checkpoint", "b", "--version-compatible"], "--version-compatible goes with --trt"),
        (["checkpoint", "--trt"], "expected a checkpoint and a bundle to write, or --trt --bundle BUNDLE"),
        (["--trt", "--bundle", "b", "--precision", "f16"], "--precision is that of b"),
        (["--trt", "--bundle", "b", "--target", "cpu"], "--target cpu contradicts --trt"),
        (["checkpoint", "b", "--trt", "--bundle", "b"], "it takes no checkpoint"),
        (["--trt", "--bundle", "b", "--traffic", "t", "--trt-profile", "batch=1:2:3"], "choose one"),
        (["--trt", "--bundle", "absent"], "no bundle here"),
    ],
)
def test_arguments_that_do_not_go_together(arguments: Sequence[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


# -- padded texts -----------------------------------------------------------------------------------------------------------


def test_exported_graphs_answer_padded_texts_alike(bundle_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What engines with CUDA graphs for some lengths get; real attention, unlike the tiny bundle's of `tests/engine`."""
    bundle, texts = Bundle.load(bundle_path), ["is red", "is red and has stripes", "shows a shirt"]
    queries = [Query(image=noise_image(n), text=text) for n, text in enumerate(texts)]
    longest = bundle.manifest.tokenizer.max_length
    plain = RetrievalEngine.load(bundle_path, provider="cpu", threads=1)
    for buckets in ((8, longest), (longest,)):
        monkeypatch.setattr(OnnxSession, "text_buckets", buckets, raising=False)
        padding = RetrievalEngine.load(bundle_path, provider="cpu", threads=1)
        for select in (slice(0, 1), slice(0, 3)):
            found, expected = (engine.encode_queries(queries[select]) for engine in (padding, plain))
            for name in ("queries", "predicted_weights"):
                np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=0, atol=1e-6)


# -- the page ---------------------------------------------------------------------------------------------------------------

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "tensorrt.md").read_text(encoding="utf-8")


def test_the_page_has_every_option() -> None:
    (group,) = (group for group in build_parser()._action_groups if group.title == "TensorRT")
    options = [action.option_strings[0] for action in group._group_actions]
    assert len(options) > 8
    assert [option for option in options if f"`{option}" not in PAGE] == []


def test_the_page_explains_messages_that_there_are() -> None:
    folders = ("dqe_engine", "export/dqe_export")
    sources = "".join(path.read_text(encoding="utf-8") for folder in folders for path in (ROOT / folder).rglob("*.py"))
    rows = re.findall(r"^\| `([^`]+)` \|", PAGE.partition("## Troubleshooting")[2], re.MULTILINE)
    assert len(rows) > 10
    assert [row for row in rows if row not in sources] == []
