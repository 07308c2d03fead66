"""Requests made from the OpenAPI document, good and bad: the server answers each as the document says, and never by a 5xx."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.server import WRITE_KEY, running

from dqe_engine.server.settings import Key, ServerSettings

pytestmark = pytest.mark.slow


def test_schemathesis_finds_nothing(make_settings: Callable[..., ServerSettings], keys: tuple[Key, ...], tmp_path: Path) -> None:
    config = Path(__file__).with_name("schemathesis.toml")
    with running(make_settings(keys=keys)) as url:
        command = ["--config-file", str(config), "run", f"{url}/openapi.json", "--checks", "all", "--max-examples", "20", "--seed", "1"]
        found = subprocess.run(
            [str(Path(sys.executable).with_name("schemathesis")), *command, "--header", f"Authorization: Bearer {WRITE_KEY}", "--no-color"],
            capture_output=True, text=True, cwd=tmp_path,
        )  # fmt: skip
    assert found.returncode == 0, "\n".join(line[:300] for line in found.stdout.splitlines()[-150:])
