"""Every command runs to its end with the extra that brings it: what its package imports, also when called, is in that extra."""

from __future__ import annotations

import ast
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = {"dqe_engine", "dqe_training", "dqe_export"}
NAMES = {
    "pillow": "PIL",
    "pyyaml": "yaml",
    "faiss_cpu": "faiss",
    "faiss_gpu": "faiss",
    "onnxruntime_gpu": "onnxruntime",
    "cuda_bindings": "cuda",
}
"""Distributions whose import name is another."""
BROUGHT = {"transformers": {"huggingface_hub"}, "jinja2": {"markupsafe"}}
"""Distributions that bring others of which we import."""
OPTIONAL = {
    "dqe_engine": {"onnxruntime", "tensorrt", "cuda", "faiss", "ray"},
    "dqe_training": {"peft", "onnxruntime", "pyarrow"},
    "dqe_export": {"onnxruntime", "tensorrt"},
}
"""What an option or another extra (cpu or gpu, lora, ray) brings, or one dataset needs (pyarrow); its absence is one line that says so."""


def names_of(extra: str | None) -> set[str]:
    """Import names that a plain installation, or one with the extra, brings."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found: set[str] = set()
    for requirement in project["dependencies"] if extra is None else project["optional-dependencies"][extra]:
        name = requirement.split(";")[0].split(">")[0].strip()
        if name.startswith("dqe-engine["):
            for other in name[len("dqe-engine[") : -1].split(","):
                found |= names_of(other)
        else:
            plain = name.lower().replace("-", "_")
            found |= {NAMES.get(plain, plain)} | BROUGHT.get(plain, set())
    return found


def imported(package: Path) -> dict[str, set[str]]:
    """Top-level names that a package's files import, anywhere in them, with the files."""
    found: dict[str, set[str]] = {}
    for path in package.rglob("*.py"):
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
    ("package", "extras"), [("dqe_engine", ()), ("training/dqe_training", ("train",)), ("export/dqe_export", ("export",))]
)
def test_what_a_package_imports_is_in_its_extra(package: str, extras: tuple[str, ...]) -> None:
    allowed = set[str]().union(names_of(None), *(names_of(extra) for extra in extras), OPTIONAL[package.split("/")[-1]])
    found = imported(ROOT / package)
    assert len(found) >= 4
    assert {name: files for name, files in found.items() if name not in allowed} == {}
