"""All probes, in the order in which they are shown."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

from dqe_engine.processors import available_cpus

from .findings import Context, Finding
from .isolation import run_isolated

Examination = dict[str, list[Finding]]
"""Findings by section, in order."""

NVIDIA, ZONE_KERNELS, ONNX_RUNTIME, BUNDLE = "NVIDIA", "zone kernels", "ONNX Runtime", "bundle"
PROBES: Mapping[str, str] = {
    "libraries": "libraries:probe",
    NVIDIA: "nvidia:probe",
    ZONE_KERNELS: "kernels:probe",
    ONNX_RUNTIME: "onnx_runtime:probe",
    "TensorRT": "tensorrt_runtime:probe",
    "FAISS": "faiss_search:probe",
    "extras": "libraries:probe_extras",
}
"""By section, where in this package its probe is."""

BUNDLE_SECONDS = 900.0
"""Hashing and loading gigabytes takes its time."""


def examine(bundle: str | None = None) -> Examination:
    """Run every probe, and those of `bundle` (a directory) if given. Raises nothing: whatever goes wrong is a finding."""
    nvidia = _run(NVIDIA, Context())
    context = Context(devices=max((finding.facts.get("devices", 0) for finding in nvidia), default=0), bundle=bundle)
    with ThreadPoolExecutor(max_workers=min(4, available_cpus())) as pool:
        running = {section: pool.submit(_run, section, context) for section in PROBES if section != NVIDIA}
        found = {section: nvidia if section == NVIDIA else running[section].result() for section in PROBES}
    if bundle is not None:
        providers = [finding.facts["provider"] for finding in found[ONNX_RUNTIME] if finding.status == "ok" and "provider" in finding.facts]
        known = dataclasses.replace(context, providers=tuple(providers))
        found[BUNDLE] = run_isolated(f"{__package__}.bundle_graphs:probe", known, timeout=BUNDLE_SECONDS)
    return found


def all_findings(examination: Examination) -> Iterable[Finding]:
    return (finding for findings in examination.values() for finding in findings)


def _run(section: str, context: Context) -> list[Finding]:
    return run_isolated(f"{__package__}.{PROBES[section]}", context)
