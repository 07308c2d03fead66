"""Where the page's tests cannot run, they are skipped and name what to install."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RUN = "import sys, pytest; sys.modules.update(dict.fromkeys(sys.argv[1:2])); sys.exit(pytest.main(sys.argv[2:]))"


@pytest.mark.parametrize(
    ("module", "path", "says"),
    [
        ("playwright", os.environ["PATH"], "no playwright: pip install -e '.[dev]'"),
        ("axe_playwright_python", os.environ["PATH"], "no axe-playwright-python: pip install -e '.[dev]'"),
        ("no_such_module", "", "no chromium, chromium-browser, google-chrome on PATH: apt-get install chromium"),
    ],
)
def test_the_reason_names_what_to_install(module: str, path: str, says: str, tmp_path: Path) -> None:
    """`module` cannot be imported, and programs are looked for in `path` alone."""
    options = (
        "-q",
        "-n0",
        "-p",
        "no:cacheprovider",
        f"--basetemp={tmp_path / 'base'}",
        "tests/server/test_page_search.py",
        "-k",
        "zones_are_told",
    )
    command = [sys.executable, "-c", RUN, module, *options]
    ran = subprocess.run(command, cwd=ROOT, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False)
    assert "1 skipped" in ran.stdout, ran.stdout + ran.stderr
    assert says in ran.stdout
    assert "failed" not in ran.stdout + ran.stderr
