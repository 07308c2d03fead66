"""The Python of README and of the pages about queries and images runs as it stands, on an index like the demo's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.samples import noise_image

from dqe_engine.bundle import Bundle
from dqe_engine.engine import RetrievalEngine

ROOT = Path(__file__).parents[2]


def programs(page: str) -> list[str]:
    """Its Python, in the order of the page; each goes on with what the ones before have defined."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.fixture
def demo(tmp_path: Path, bundle_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The demo's folders, with a tiny bundle and a few images under the demo's names."""
    images = tmp_path / "demo" / "garments" / "images"
    (images / "gallery").mkdir(parents=True)
    for n in range(12):
        noise_image(n).save(images / "gallery" / f"{n:06}.jpg")
    (tmp_path / "demo" / "bundle").symlink_to(bundle_path)
    engine = RetrievalEngine.load(bundle_path, provider="cpu", threads=1)
    assert "colour" in Bundle.load(bundle_path).vocabulary.names
    engine.index_images(images)
    engine.save_index(tmp_path / "demo" / "index")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", ["README.md", "docs/images.md", "docs/queries.md"])
def test_the_pages_python_runs(demo: Path, page: str) -> None:
    found = [program for program in programs(page) if "engine" in program and "select_zones" not in program]
    assert found
    scope: dict[str, object] = {}
    for program in found:
        exec(compile(program, page, "exec"), scope)
    assert scope["result"].hits  # type: ignore[attr-defined]
