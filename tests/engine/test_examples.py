"""The programs of docs/examples run as they stand."""

from __future__ import annotations

import ast
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from dqe_engine import RetrievalEngine, sample

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
TESTS = (Path(__file__), Path(__file__).parents[1] / "export" / "test_fashioniq_example.py")  # what trains has a file of its own


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twelve photos of the sample."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for photo in sorted(sample.photos().glob("*.jpg"))[:12]:
        shutil.copy(photo, folder)
    return folder


def names(folder: Path) -> list[str]:
    return sorted(photo.name for photo in folder.iterdir())


def test_every_example_is_listed_and_tested() -> None:
    programs = {path.name for path in EXAMPLES.iterdir()} - {"README.md", "__pycache__"}
    page, tests = (EXAMPLES / "README.md").read_text(encoding="utf-8"), "".join(path.read_text(encoding="utf-8") for path in TESTS)
    assert programs
    for program in programs:
        assert f"({program})" in page
        assert program.partition(".")[0] in tests


def test_photo_folder(photos: Path, tmp_path: Path) -> None:
    (photos / "damaged.jpg").write_bytes((photos / names(photos)[0]).read_bytes()[:500])
    reference = photos / names(photos)[0]
    command = [sys.executable, EXAMPLES / "photo_folder.py", sample.bundle(), photos, tmp_path / "index", reference, "is red"]
    first, second = (subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines() for _ in range(2))
    assert first[0].startswith("12 added")
    assert "12 unchanged, 1 skipped (1 damaged)" in second[0]
    assert first[1:] == second[1:]
    assert len(first) == 6


def test_shop_nightly(photos: Path, tmp_path: Path) -> None:
    shop, index, catalogue = load("shop_nightly"), tmp_path / "index", tmp_path / "catalogue.jsonl"
    articles = names(photos)

    def write(listed: list[str], price: float) -> None:
        catalogue.write_text("".join(json.dumps({"id": id, "price": price + n}) + "\n" for n, id in enumerate(listed)))

    write(articles, 10)
    report, removed = shop.update(sample.bundle(), index, photos, catalogue)
    assert (len(report.added), removed) == (12, 0)
    shutil.copy(photos / articles[1], photos / articles[0])
    write(articles[:-2], 20)
    report, removed = shop.update(sample.bundle(), index, photos, catalogue)
    assert (report.changed, len(report.described), removed) == ((articles[0],), 9, 2)
    with RetrievalEngine.load(sample.bundle()) as engine:
        engine.load_index(index)
        found = shop.cheaper(engine, articles[5], "is red", below=23)
    assert {hit.id for hit in found.hits} == set(articles[:3])


def test_in_fastapi(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RetrievalEngine.load(sample.bundle()) as engine:
        engine.index_images(photos)
        engine.save_index(tmp_path / "index")
    monkeypatch.setenv("DQE_BUNDLE", str(sample.bundle()))
    monkeypatch.setenv("DQE_INDEX", str(tmp_path / "index"))
    article = names(photos)[3]
    with TestClient(load("in_fastapi").app) as client:
        found = client.get(f"/similar/{article}", params={"text": "is red", "k": 4}).json()
        wrong = client.get("/similar/nothing.jpg", params={"text": "is red"})
    assert len({hit["id"] for hit in found["hits"]} - {article}) == 4
    assert found["mode"] == "composed"
    assert (wrong.status_code, "nothing.jpg" in wrong.json()["detail"]) == (422, True)


def test_mine_negatives() -> None:
    example, rng = load("mine_negatives"), np.random.default_rng(1)
    gallery = rng.standard_normal((500, 16), dtype=np.float32)
    gallery /= np.linalg.norm(gallery, axis=1, keepdims=True)
    targets, references = np.arange(40), np.arange(40, 80)
    picks = example.refresh(gallery[targets].copy(), gallery, targets, references, epoch=3)
    assert picks.shape == (40, 8)
    assert (picks >= 0).any()
    assert not ((picks == targets[:, None]) | (picks == references[:, None])).any()
    picks[0] = -1
    drawn = example.one_each(picks, rng)
    assert drawn[0] == -1
    assert all(drawn[row] in picks[row] for row in range(40))
    assert ((drawn == -1) == (picks[:, 0] == -1)).all()


def test_tour() -> None:
    """The notebook's cells, in one namespace as a kernel runs them; what a cell ends with is what it shows."""
    cells = [cell for cell in json.loads((EXAMPLES / "tour.ipynb").read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] for cell in cells)
    scope: dict[str, Any] = {}
    shown = []
    for number, cell in enumerate(cells):
        tree = ast.parse("".join(cell["source"]))
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, f"cell {number}", "exec"), scope)
        if last is not None:
            shown.append(eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), scope))
    assert len([picture for picture in shown if isinstance(picture, Image.Image)]) == 6
    assert all(hit.metadata["price"] < 40 for hit in scope["cheap"].hits)
    assert [hit.id for hit in scope["weighted"].hits] != [hit.id for hit in scope["result"].hits]
    parts = scope["parts"]
    assert parts.base + sum(parts.attributes.values()) == pytest.approx(scope["explained"].score, abs=1e-5)
    assert scope["zones"].mid
