"""Every command runs to its end with the extra that brings it: what its package imports, also when called, is in that extra."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

from dqe_engine.tensorrt.api import SUPPORTED_MAJORS

ROOT = Path(__file__).parents[1]
OURS = {"dqe_engine", "dqe_training", "dqe_export"}
NAMES = {
    "pillow": "PIL",
    "pyyaml": "yaml",
    "faiss_cpu": "faiss",
    "onnxruntime_gpu": "onnxruntime",
    "cuda_bindings": "cuda",
}
"""Distributions whose import name is another."""
BROUGHT = {"fastapi": {"starlette"}, "uvicorn": {"httptools", "h11"}, "transformers": {"huggingface_hub"}, "jinja2": {"markupsafe"}}
"""Distributions that bring others of which we import."""
OPTIONAL = {
    "dqe_engine": {"onnxruntime", "tensorrt", "cuda", "faiss", "ray", "huggingface_hub", "pymilvus", "grpc"},
    "dqe_training": {"peft", "onnxruntime", "pyarrow"},
    "dqe_export": {"onnxruntime", "tensorrt"},
}
"""What an option or another extra (cpu or gpu, lora, ray, hub, milvus) brings, or one dataset needs (pyarrow); its absence is one line."""


TWINS = {"onnxruntime", "onnxruntime_gpu"}
"""Distributions that overwrite one another's files."""
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def distributions_of(extra: str | None) -> dict[str, str]:
    """What a plain installation, or one with the extra, brings: requirements by name."""
    found: dict[str, str] = {}
    for requirement in PROJECT["dependencies"] if extra is None else PROJECT["optional-dependencies"][extra]:
        name = requirement.split(";")[0].split(">")[0].strip()
        if name.startswith("dqe-engine["):
            for other in name[len("dqe-engine[") : -1].split(","):
                found |= distributions_of(other)
        else:
            found[name.partition("[")[0].lower().replace("-", "_")] = requirement
    return found


def names_of(extra: str | None) -> set[str]:
    """Import names that a plain installation, or one with the extra, brings."""
    return set[str]().union(*({NAMES.get(name, name)} | BROUGHT.get(name, set()) for name in distributions_of(extra)))


def imported(package: Path) -> dict[str, set[str]]:
    """Top-level names that a package's files import, anywhere in them, with the files."""
    found: dict[str, set[str]] = {}
    for path in package.rglob("*.py") if package.is_dir() else [package]:
        if package.name == "dqe_engine" and (path.parent.name == "server" or path.name == "client.py"):
            continue  # with extras of their own
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            for name in names:
                found.setdefault(name.partition(".")[0], set()).add(path.name)
    return {name: files for name, files in found.items() if name not in sys.stdlib_module_names | OURS}


@pytest.mark.parametrize(
    ("package", "extras", "at_least"),
    [
        ("dqe_engine", (), 4),
        ("dqe_engine/server", ("serve",), 4),
        ("dqe_engine/client.py", ("client",), 2),
        ("training/dqe_training", ("train",), 4),
        ("export/dqe_export", ("export",), 4),
    ],
)
def test_what_a_package_imports_is_in_its_extra(package: str, extras: tuple[str, ...], at_least: int) -> None:
    optional = OPTIONAL.get(package.split("/")[-1], set())
    allowed = set[str]().union(names_of(None), *(names_of(extra) for extra in extras), optional)
    found = imported(ROOT / package)
    assert len(found) >= at_least
    assert {name: files for name, files in found.items() if name not in allowed} == {}


def test_tensorrt_goes_with_either_runtime() -> None:
    """`pip install 'dqe-engine[gpu]'` where `[cpu]` is installed puts onnxruntime-gpu's files over onnxruntime's, and neither works."""
    tensorrt, cpu, gpu = (distributions_of(extra) for extra in ("tensorrt", "cpu", "gpu"))
    assert tensorrt.items() <= gpu.items()
    assert set(tensorrt) == {"tensorrt", "cuda_bindings"}
    assert len(TWINS & {*tensorrt, *cpu}) == len(TWINS & set(gpu)) == 1
    assert not TWINS & set(tensorrt)


def test_what_serves_brings_no_library_that_only_benchmarks_use() -> None:
    """FAISS alone is as large as ONNX Runtime."""
    for extra in (None, "cpu", "gpu", "serve"):
        assert "faiss" not in names_of(extra)
    assert "faiss" in names_of("bench")


def test_the_tensorrt_that_is_installed_is_one_that_runs() -> None:
    requirement = distributions_of("tensorrt")["tensorrt"]
    assert requirement == f"tensorrt>={SUPPORTED_MAJORS[0]}.3,<{SUPPORTED_MAJORS[-1] + 1}"


def test_messages_name_extras_that_exist_and_the_one_that_is_missing() -> None:
    files = [
        *(path for folder in ("dqe_engine", "training", "export", "docs") for path in (ROOT / folder).rglob("*.[pm][yd]")),
        ROOT / "README.md",
    ]
    advised = {file: re.findall(r"dqe-engine\[([\w,]+)\]", file.read_text(encoding="utf-8")) for file in files}
    assert sum(map(len, advised.values())) >= 8
    named = {extra for extras in advised.values() for text in extras for extra in text.split(",")}
    assert named <= set(PROJECT["optional-dependencies"])
    of_tensorrt = {
        file.name: set(extras) for file, extras in advised.items() if "tensorrt" in file.as_posix() and file.suffix == ".py" and extras
    }
    assert of_tensorrt == {name: {"tensorrt"} for name in ("api.py", "cuda.py", "tensorrt_runtime.py")}
