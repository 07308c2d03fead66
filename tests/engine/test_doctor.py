"""`dqe-doctor` as a user meets it: the real run, its exit codes, its JSON, and probes that end badly."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.doctor_probes import GOOD, findings

from dqe_engine.cli import doctor as command
from dqe_engine.doctor import Finding, bundle_graphs, describe, examination, first_lines, isolation
from dqe_engine.doctor.findings import Context
from dqe_engine.doctor.isolation import run_isolated
from dqe_engine.sessions import OnnxSession

SECTIONS = ["libraries", "NVIDIA", "zone kernels", "ONNX Runtime", "TensorRT", "FAISS", "extras"]


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    code = command.main(["--json", *arguments])
    return code, json.loads(capsys.readouterr().out)


def by_name(report: dict[str, Any], section: str) -> dict[str, dict[str, Any]]:
    return {finding["name"]: finding for finding in report["findings"] if finding["section"] == section}


def test_this_machine_and_a_bundle(bundle_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, report = run_json(capsys, str(bundle_path))
    assert (code, report["ok"]) == (0, True), [finding for finding in report["findings"] if finding["status"] == "broken"]
    assert list(report) == ["dqe_engine", "ok", "machine", "findings"]
    assert report["machine"] == describe()
    for finding in report["findings"]:
        assert set(finding) == {"section", "name", "status", "found", "remedy", "facts"}
        assert finding["status"] in ("ok", "not installed", "not available")
        assert "\n" not in finding["found"] + (finding["remedy"] or "")
        assert (finding["remedy"] is None) == (finding["status"] == "ok"), finding
    assert list(dict.fromkeys(finding["section"] for finding in report["findings"])) == [*SECTIONS, "bundle"]

    from dqe_engine import _kernels

    kernels = by_name(report, "zone kernels")
    assert kernels["CPU kernels"]["facts"] == {"instruction_sets": (sets := _kernels.instruction_sets()), "chosen": sets[0]}
    assert all(kernels[f"CPU, {name}"]["facts"] == {"agrees": True} for name in sets)
    assert by_name(report, "ONNX Runtime")["CPU provider"]["status"] == "ok"
    bundle = by_name(report, "bundle")
    assert bundle["files"]["facts"]["name"] == "tiny"
    assert {f"{graph}, cpu" for graph in ("vision_encoder", "query_encoder", "attribute_heads", "target_encoder")} <= set(bundle)


@pytest.mark.parametrize("bundle", ["absent", "file"])
def test_wrong_arguments(bundle: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert command.main([str(tmp_path / bundle)]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / bundle}: not a directory; give a bundle's folder, or hf://OWNER/NAME@REVISION\n"


@pytest.fixture
def fake_probes(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put probes of `support.doctor_probes` in place of the sections' own."""

    def replace(**probes: str) -> None:
        monkeypatch.setattr(examination, "PROBES", {examination.NVIDIA: "nvidia", examination.ONNX_RUNTIME: "onnx"} | probes)
        support = {"nvidia": "driver_with_devices", "onnx": "noisy"}

        def run(probe: str, context: Context, **options: float) -> list[Finding]:
            name = probe.removeprefix("dqe_engine.doctor.")
            return run_isolated(f"support.doctor_probes:{support.get(name, name)}", context, **options)

        monkeypatch.setattr(examination, "run_isolated", run)

    return replace


def test_what_earlier_probes_found_reaches_later_ones(fake_probes: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    fake_probes()
    code, report = run_json(capsys)
    assert code == 0
    assert by_name(report, "ONNX Runtime")["context"]["found"] == "3 None ()"
    assert by_name(report, "ONNX Runtime")["good"]["facts"] == {"answer": 42}


def test_one_broken_thing_is_exit_1_and_the_table_says_what_to_do(
    fake_probes: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    fake_probes(shaky="crashes", raising="raises")
    assert command.main([]) == 1
    out = capsys.readouterr().out
    lines = [line.strip() for line in out.splitlines()]
    assert any(line.startswith("risky") and "broken" in line and "SIGABRT" in line for line in lines), out
    assert any("RuntimeError: two lines" in line for line in lines), out
    assert lines.count("→ mend it") == 2
    assert lines[-1].startswith("2 of 7 checks found something broken")
    assert "Traceback" not in out


def test_all_well_is_said(fake_probes: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    fake_probes()
    assert command.main([]) == 0
    out = capsys.readouterr().out
    assert out.endswith("all that is installed works\n")
    first = first_lines(describe({}))  # these probes say nothing of kernels and providers
    assert out.splitlines()[: len(first)] == first


def test_a_terminal_that_knows_ascii_only(fake_probes: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    fake_probes(shaky="crashes")
    for arguments in ([], ["--json"]):
        out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        monkeypatch.setattr(sys, "stdout", out)
        assert command.main(arguments) == 1
        out.seek(0)
        assert "mend it" in out.read()


@pytest.mark.parametrize(
    ("probe", "found"),
    [
        ("crashes", "its process crashed (SIGABRT): last words"),
        ("exits", "its process exited with code 0"),
        ("raises", "RuntimeError: two lines"),
    ],
)
def test_a_probe_that_ends_badly_keeps_what_it_found(probe: str, found: str) -> None:
    good, broken = run_isolated(f"support.doctor_probes:{probe}", Context())
    assert good == GOOD
    assert broken == Finding("risky", "broken", found, "mend it")


def test_a_probe_that_hangs() -> None:
    (broken,) = run_isolated("support.doctor_probes:hangs", Context(), timeout=3)
    assert (broken.status, broken.found) == ("broken", "no answer within 3 seconds")


@pytest.mark.parametrize("probe", ["support.absent:probe", "support.doctor_probes:absent"])
def test_a_probe_that_cannot_be_loaded_is_a_finding(probe: str) -> None:
    (broken,) = run_isolated(probe, Context())
    assert broken.status == "broken"
    assert "absent" in broken.found


def test_output_that_was_cut_off() -> None:
    cut = b'{"trying": {"name": "risky", "remedy": "mend it"}}\n{"finding": {"name": "x", "sta'
    assert isolation._read(cut) == ([], ("risky", "mend it"), False)


def test_a_damaged_bundle_is_broken(bundle_path: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(bundle_path, tmp_path / "damaged"))
    graph = damaged / "vision_encoder.onnx"
    data = bytearray(graph.read_bytes())
    data[len(data) // 2] ^= 1
    graph.write_bytes(data)
    (finding,) = run_isolated("dqe_engine.doctor.bundle_graphs:probe", Context(bundle=str(damaged), providers=("cpu",)))
    assert finding.status == "broken"
    assert finding.found.endswith("its bytes changed since export (SHA-256 differs)")
    assert finding.remedy == "copy the bundle again"


def test_a_graph_whose_outputs_are_not_finite_is_broken(bundle_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = OnnxSession.run

    def run_badly(self: OnnxSession, **inputs: Any) -> dict[str, Any]:
        outputs = run(self, **inputs)
        if self.spec.name == "query_encoder":
            outputs["fused_text"][0, -1, -1] = float("nan")
        return outputs

    monkeypatch.setattr(OnnxSession, "run", run_badly)
    found = findings(bundle_graphs.probe, bundle=str(bundle_path), providers=("cpu",))
    assert [name for name, finding in found.items() if finding.status == "broken"] == ["query_encoder, cpu"]
    assert found["query_encoder, cpu"].found == "fused_text holds values that are not finite"


def test_a_bundle_on_a_provider_that_fails_names_the_graph(bundle_path: Path) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    found = run_isolated("dqe_engine.doctor.bundle_graphs:probe", Context(bundle=str(bundle_path), providers=("cpu", "cuda")))
    assert [finding.status for finding in found] == ["ok"] * 5 + ["broken"]
    assert found[-1].name == "vision_encoder, cuda"
    assert "BackendError: provider 'cuda'" in found[-1].found
