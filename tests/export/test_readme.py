"""The Python of README and of the pages about queries and images runs as it stands, on an index like the demo's; README's figures are
those of a run's file."""

from __future__ import annotations

import json
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


def test_what_it_reaches_is_what_a_run_wrote() -> None:
    """The table, the margins' basis and the latencies of README are those of the run's own file."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text[text.index("## What it reaches") : text.index("## How it is built")]
    results = ROOT / "benchmarks" / "results" / "amd-epyc-2-cores"
    run, busy = (json.loads((results / name).read_text(encoding="utf-8")) for name in ("demo.json", "demo-busy.json"))
    keys = ("recall_at_1", "recall_at_5", "recall_at_10", "recall_at_50", "heldout_recall_at_10", "attribute_precision_at_10", "map_at_10")
    rows = [
        [cell.strip(" *") for cell in line.split("|")[2:-1]]
        for line in section.splitlines()
        if line.startswith(("| DQE-CIR", "| baseline"))
    ]
    for row, figures, name in zip(rows, (run, run["baseline"]), ("dqe", "baseline"), strict=True):
        assert row == [*(f"{100 * figures[key]:.1f}" for key in keys), str(run["steps"][name])]
    assert run["environment"]["commit"] in section
    minutes, seconds = divmod(round(run["seconds_in_all"]), 60)
    catalogue, uploaded = run["latency_ms"]["Catalogue reference"], run["latency_ms"]["Uploaded reference"]
    for said in (
        f"{minutes} min {seconds} s",
        f"the same {run['training_seconds']['dqe']:.0f} seconds",
        f"{catalogue['p50']:.1f} ms at the median with a catalogue reference and {uploaded['p50']:.1f} ms with an uploaded one",
        f"(p95 {catalogue['p95']:.1f} and {uploaded['p95']:.1f})",
        f"within {run['embedding_max_abs_diff']:.1e}".replace("e-0", "e-"),
        f"{busy['steps']['baseline']} steps and R@10 {100 * busy['baseline']['recall_at_10']:.1f}",
    ):
        assert said in section, said
    assert all(run[key] == busy[key] for key in keys)  # DQE-CIR's row, of two runs
