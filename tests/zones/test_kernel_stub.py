"""`_kernels.pyi` says what the compiled module has: every function and constant, their arguments, and the types of arrays."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from nanobind.stubgen import StubGen

import dqe_engine
from dqe_engine import _kernels

STUB = Path(dqe_engine.__file__).with_name("_kernels.pyi")
DTYPES = {"F32": "float32", "F64": "float64", "I64": "int64"}


def annotation(node: ast.expr | None) -> str:
    """A type as both sides can say it: an array by its dtype alone, a sequence by "Sequence"."""
    text = "" if node is None else ast.unparse(node)
    optional = " | None" if text.endswith("| None") else ""
    if "Sequence" in text:
        return "Sequence" + optional
    for alias, dtype in DTYPES.items():
        text = re.sub(rf"\b{alias}\b", f"NDArray[np.{dtype}]", text)
    if "NDArray" in text:
        found = re.search(r"(?:np|numpy)\.(float\d+|u?int\d+)", text)
        return f"array of {found[1] if found else 'Any'}{optional}"
    return text


def described(source: str) -> dict[str, object]:
    """Names of a stub: functions with their arguments, constants with their type."""
    found: dict[str, object] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):
            plain = [(a.arg, annotation(a.annotation)) for a in node.args.args]
            by_name = {a.arg: annotation(a.annotation) for a in node.args.kwonlyargs}
            found[node.name] = (plain, by_name, [ast.unparse(d) for d in node.args.defaults], annotation(node.returns))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found[node.target.id] = annotation(node.annotation)
    return found


def compiled() -> dict[str, object]:
    generator = StubGen(_kernels)
    generator.put(_kernels)
    return described(generator.get())


def test_the_stub_is_the_modules() -> None:
    found = compiled()
    assert len(found) >= 6
    assert described(STUB.read_text(encoding="utf-8")) == found


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("threads: int,\n    instruction_set", "instruction_set"),
        ("seed: int", "seed: float"),
        ("counts: I64", "counts: F32"),
        ("def encode", "def code"),
    ],
)
def test_what_differs_is_seen(old: str, new: str) -> None:
    text = STUB.read_text(encoding="utf-8")
    assert old in text
    assert described(text.replace(old, new)) != compiled()
