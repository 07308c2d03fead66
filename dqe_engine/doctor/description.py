"""What a machine is, in one record: `dqe-doctor --json` writes it under "machine", and the tests' header shows its lines.

Its keys stay as they are; a value that a machine does not give is null.

* `processor`: the model's name; `architecture`: "x86_64", "aarch64", …; `virtual`: whether a hypervisor is underneath.
* `instruction_sets`: of those that decide which kernels run and how they round ("avx2", "avx512_vnni", "neon", "dotprod", …).
* `cores`: `machine` has so many, `allowed` to this process; `quota`, such as 1.5: the container may take no more processors' time.
* `memory`: `bytes` of the machine, and the container's `limit` in bytes.
* `system`: kernel and C library; `python`: version and implementation.
* `packages`: version by name, of all that this project can use.
* `zone_kernels`: the kernel sets that run here (`runnable`), and the one that is `chosen`; null and empty where they are not built.
* `onnx_runtime`: `version`, `providers` of the package, and `int8_saturates`: whether sums of unsigned times signed 8-bit products
  overflow 16 bits, as they do on x86-64 without VNNI.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError
from typing import Any

from .. import processors
from . import machine
from .examination import ONNX_RUNTIME, ZONE_KERNELS
from .findings import Context, Finding
from .isolation import run_isolated
from .packages import requirements, version_of

Description = dict[str, Any]
"""The record above; JSON types only."""

_EXTRAS = ("cpu", "gpu", "train", "lora", "ray", "export", "serve", "bench", "dev")
_SHOWN = ("numpy", "pillow", "onnxruntime", "onnxruntime-gpu", "torch", "transformers", "onnx")
_SHORT_PROBES = {ZONE_KERNELS: "kernels:probe_cpu_sets", ONNX_RUNTIME: "onnx_runtime:probe_package"}
"""By section, the part of its probe that tells what this record holds."""


def describe(examination: Mapping[str, Iterable[Finding]] | None = None) -> Description:
    """The record of this machine. What libraries say comes from `examination`; without one, they are asked in processes of their own."""
    found: Mapping[str, Iterable[Finding]] = _ask() if examination is None else examination
    facts = {section: _facts(found.get(section, ())) for section in _SHORT_PROBES}
    return {
        "processor": machine.processor_name(),
        "architecture": platform.machine(),
        "virtual": machine.is_virtual(),
        "instruction_sets": machine.instruction_sets(),
        "cores": {"machine": os.cpu_count(), "allowed": processors.cores(), "quota": processors.core_quota()},
        "memory": {"bytes": machine.memory_bytes(), "limit": machine.memory_limit()},
        "system": machine.system(),
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "packages": _packages(),
        "zone_kernels": {
            "runnable": facts[ZONE_KERNELS].get("instruction_sets", []),
            "chosen": facts[ZONE_KERNELS].get("chosen"),
        },
        "onnx_runtime": {
            "version": facts[ONNX_RUNTIME].get("version"),
            "providers": facts[ONNX_RUNTIME].get("providers", []),
            "int8_saturates": facts[ONNX_RUNTIME].get("int8_saturates"),
        },
    }


def first_lines(description: Description) -> list[str]:
    """The record for people, without the packages that decide nothing."""
    cores, memory, kernels, runtime = (description[name] for name in ("cores", "memory", "zone_kernels", "onnx_runtime"))
    usable = f"{cores['allowed']} of {cores['machine']} cores" if cores["allowed"] != cores["machine"] else f"{cores['allowed']} cores"
    quota = f", of which the container gives {cores['quota']:g}" if cores["quota"] else ""
    limit = f", of which the container gives {_gibibytes(memory['limit'])}" if memory["limit"] else ""
    versions = {name: description["packages"].get(name) for name in _SHOWN}
    saturates = {None: "not tried", False: "exact", True: "saturate"}[runtime["int8_saturates"]]
    providers = ", ".join(name.removesuffix("ExecutionProvider") for name in runtime["providers"])
    return [
        f"processor: {description['processor']}, {usable}{quota}{', virtual' if description['virtual'] else ''}",
        f"instruction sets: {' '.join(description['instruction_sets']) or 'unknown'}",
        f"memory: {_gibibytes(memory['bytes'])}{limit}; {description['system']}; Python {description['python']}",
        f"packages: {', '.join(f'{name} {version}' for name, version in versions.items() if version)}",
        f"zone kernels: {kernels['chosen'] or 'none'} (of {', '.join(kernels['runnable']) or 'none'}); "
        f"ONNX Runtime: {providers or 'none'}; its 8-bit products: {saturates}",
    ]


def _ask() -> dict[str, list[Finding]]:
    with ThreadPoolExecutor(len(_SHORT_PROBES)) as pool:
        running = {section: pool.submit(run_isolated, f"{__package__}.{probe}", Context()) for section, probe in _SHORT_PROBES.items()}
        return {section: future.result() for section, future in running.items()}


def _facts(findings: Iterable[Finding]) -> dict[str, Any]:
    """Of all findings of a section; the first that says a thing counts."""
    found: dict[str, Any] = {}
    for finding in findings:
        found = finding.facts | found
    return found


def _packages() -> dict[str, str | None]:
    try:
        names = {requirement.name for extra in (None, *_EXTRAS) for requirement in requirements(extra)}
    except PackageNotFoundError:  # run from a folder, without being installed
        names = set(_SHOWN)
    return {name: version_of(name) for name in sorted(names)}


def _gibibytes(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**30:.1f} GiB"
