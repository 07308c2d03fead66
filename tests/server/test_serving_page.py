"""The commands and the Python of docs/serving.md run as they stand there, against servers that the page starts."""

from __future__ import annotations

import json
import os
import re
import subprocess
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from support.samples import noise_image
from support.serving import serving

from dqe_engine.engine import RetrievalEngine

ROOT = Path(__file__).parents[2]
ADDRESS = "http://127.0.0.1:8000"
IMAGES = 12


@pytest.fixture
def demo(tmp_path: Path, bundle_path: Path) -> Path:
    """The demo's folders, with a tiny bundle, a few images under the demo's names, and metadata with its keys."""
    images = tmp_path / "demo" / "garments" / "images"
    (images / "gallery").mkdir(parents=True)
    metadata: dict[str, dict[str, Any]] = {}
    for n in range(IMAGES):
        noise_image(n).save(images / "gallery" / f"{n:06}.jpg")
        metadata[f"gallery/{n:06}.jpg"] = {"colour": ("red", "blue")[n % 2], "kind": "coat", "price": 10.9 + n}
    (tmp_path / "demo" / "bundle").symlink_to(bundle_path)
    with RetrievalEngine.load(bundle_path, provider="cpu", threads=1) as engine:
        engine.index_images(images, metadata=metadata)
        engine.save_index(tmp_path / "demo" / "index")
    return tmp_path


def holds(shown: Any, given: Any, place: str = "answer") -> None:
    """What is shown has only fields that are given, each of the same kind. Values, and what was left out, may be others."""
    if isinstance(shown, dict):
        assert isinstance(given, dict), place
        for name, value in shown.items():
            assert name in given, f"{place} has no {name!r}: {sorted(given)}"
            holds(value, given[name], f"{place}.{name}")
    elif isinstance(shown, list):
        assert isinstance(given, list), place
        if shown and not place.endswith("].values"):  # a vocabulary may be free of values
            assert given, f"{place} is empty"
            holds(shown[0], given[0], f"{place}[0]")
    elif shown is not None and given is not None:
        numbers = (int, float)
        alike = isinstance(given, numbers) if type(shown) in numbers else type(given) is type(shown)
        assert alike, f"{place} is {given!r}, the page shows {shown!r}"


def test_the_pages_lines_run(demo: Path) -> None:
    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(bash|json|text|python)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    url, output, compared = ADDRESS, "", 0
    scope: dict[str, object] = {}
    previous = Path.cwd()
    os.chdir(demo)
    try:
        with ExitStack() as servers:
            for language, block in blocks:
                if language == "bash":
                    lines = [line for line in block.splitlines() if not line.startswith("dqe-serve ")]
                    output = subprocess.run(
                        ["bash", "-euo", "pipefail", "-c", "\n".join(lines).replace(ADDRESS, url)],
                        cwd=demo, check=True, capture_output=True, text=True, timeout=120,
                    ).stdout  # fmt: skip
                    for started in (line for line in block.splitlines() if line.startswith("dqe-serve ")):
                        arguments = [*started.split()[1:], "--provider", "cpu", "--threads", "1"]
                        url = servers.enter_context(serving(arguments, demo)).url
                elif language == "json":
                    holds(json.loads(block), json.JSONDecoder().raw_decode(output)[0])
                    compared += 1
                elif language == "text":
                    pattern = ".*?".join(map(re.escape, block.strip().split("…")))
                    assert re.fullmatch(pattern, output.strip()), f"expected {block}, got {output}"
                    compared += 1
                else:
                    exec(compile(block.replace(ADDRESS, url), "docs/serving.md", "exec"), scope)
    finally:
        os.chdir(previous)
    assert compared >= 12
    assert (demo / "picture.jpg").read_bytes()[:3] == b"\xff\xd8\xff"
    assert (demo / "8.jpg").read_bytes()[:3] == b"\xff\xd8\xff"
    assert json.loads((demo / "added").read_text())["id"] == "shoes/7.jpg"
    assert len(scope["answers"]) == 2  # type: ignore[arg-type]


def test_every_route_is_on_the_page(bundle_path: Path, demo: Path) -> None:
    from dqe_engine.server.app import create_app
    from dqe_engine.server.problems import CODES
    from dqe_engine.server.settings import ServerSettings

    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    app = create_app(ServerSettings(bundle=bundle_path, index=demo / "demo" / "index"))
    for path in app.openapi()["paths"]:
        assert path.replace("{id}", "gallery%2F000001.jpg") in text or path in text, path
    for status in CODES:
        assert f"| {status} |" in text, status


def test_a_shown_field_that_is_gone_is_found() -> None:
    with pytest.raises(AssertionError, match="no 'b'"):
        holds({"a": [{"b": 1}]}, {"a": [{"c": 1}]})
    with pytest.raises(AssertionError, match="shows 1"):
        holds({"a": 1}, {"a": "1"})
