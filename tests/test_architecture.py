"""The import arrows, in fresh processes: the runtime is torch-free, and no --help loads a heavy library."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

PROJECT = tomllib.loads((Path(__file__).resolve().parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
COMMANDS: dict[str, str] = PROJECT["project"]["scripts"]


def loaded_after(statement: str, libraries: tuple[str, ...]) -> set[str]:
    """Which of `libraries` a fresh interpreter has imported after running `statement`."""
    program = f"import sys\n{statement}\nprint('LOADED', *(name for name in {libraries!r} if name in sys.modules))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.splitlines()[-1].split()[1:])


def test_the_probe_sees_an_import() -> None:
    assert loaded_after("import json", ("json", "torch")) == {"json"}


def test_importing_the_runtime_is_cheap() -> None:
    assert loaded_after("import dqe_engine", ("torch", "transformers", "onnx", "onnxruntime", "faiss", "PIL", "numpy")) == set()


def test_using_the_runtime_never_loads_training_libraries() -> None:
    statement = "import dqe_engine\nfor name in dqe_engine.__all__: getattr(dqe_engine, name)"
    assert loaded_after(statement, ("torch", "transformers", "onnx", "safetensors", "dqe_training", "dqe_export")) == set()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_instant(command: str) -> None:
    module, function = COMMANDS[command].split(":")
    statement = f"""
sys.argv = [{command!r}, "--help"]
from {module} import {function}
try:
    code = {function}()
except SystemExit as stop:
    code = stop.code
assert not code, code
"""
    assert loaded_after(statement, ("torch", "transformers", "onnx", "onnxruntime", "faiss", "matplotlib")) == set()
