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
    return kept(factory, name, _key(words), lambda out: subprocess.run([*words, "-o", str(out)], check=True))


def compiled_and_said(factory: pytest.TempPathFactory, command: Sequence[str | Path], name: str) -> tuple[Path, str]:
    """What `command -o PATH` writes, and its standard error."""
    words = [str(word) for word in command]

    def compile(folder: Path) -> None:
        folder.mkdir()
        run = subprocess.run([*words, "-o", str(folder / name)], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        (folder / "said").write_text(run.stderr)

    folder = kept(factory, name, _key(words), compile)
    return folder / name, (folder / "said").read_text()


def _key(words: Sequence[str]) -> str:
    files = [file for file in sorted(SOURCES.rglob("*")) if file.is_file()]
    return digest_of(*words, _compiler(words[0]), version("nanobind"), *map(str, files), files=files)


@cache
def _compiler(program: str) -> str:
    return subprocess.run([program, "--version"], check=True, capture_output=True, text=True).stdout
