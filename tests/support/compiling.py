"""C++ that tests compile: once for the same sources, flags and compiler, in this run of pytest and in later ones."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path

import pytest
from support.shared import REPOSITORY, digest_of, kept

SOURCES = REPOSITORY / "cpp_ext"


def compiled(factory: pytest.TempPathFactory, command: Sequence[str | Path], name: str) -> Path:
    """What `command -o PATH` writes. It is made anew when a file below cpp_ext changes."""
    words = [str(word) for word in command]
    files = [file for file in sorted(SOURCES.rglob("*")) if file.is_file()]
    key = digest_of(*words, _compiler(words[0]), version("nanobind"), *map(str, files), files=files)
    return kept(factory, name, key, lambda out: subprocess.run([*words, "-o", str(out)], check=True))


@cache
def _compiler(program: str) -> str:
    return subprocess.run([program, "--version"], check=True, capture_output=True, text=True).stdout
