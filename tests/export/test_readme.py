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
from dqe_export.demo.comparison import points

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


def test_what_it_reaches_is_what_runs_wrote() -> None:
    """The table, what the comparison says and the latencies of README are those of the runs' own files."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text[text.index("## What it reaches") : text.index("## How it is built")]
    results = ROOT / "benchmarks" / "results" / "amd-epyc-2-cores"
    run, seeds = (json.loads((results / name).read_text(encoding="utf-8")) for name in ("demo.json", "demo-seeds.json"))
    keys = ("recall_at_1", "recall_at_5", "recall_at_10", "recall_at_50", "heldout_recall_at_10", "attribute_precision_at_10", "map_at_10")
    rows = [
        [cell.strip(" *") for cell in line.split("|")[2:-1]]
        for line in section.splitlines()
        if line.startswith(("| DQE-CIR", "| baseline"))
    ]
    told = [(run, "dqe"), (run["baseline"], "baseline"), (seeds, "dqe"), (seeds["baseline"], "baseline")]
    for row, (figures, name) in zip(rows, told, strict=True):
        assert row == [*(f"{100 * figures[key]:.1f}" for key in keys), str(run["steps"][name])]
    assert (run["steps"], seeds["seeds"]) == (seeds["steps"], 3)
    assert {difference["outcome"] for difference in seeds["differences"].values()} == {"unclear"}
    assert run["environment"]["commit"] in section
    minutes, seconds = divmod(round(run["seconds_in_all"]), 60)
    catalogue, uploaded = run["latency_ms"]["Catalogue reference"], run["latency_ms"]["Uploaded reference"]
    for said in (
        f"{minutes} min {seconds} s",
        f"{run['training_seconds']['dqe']:.0f} and {run['training_seconds']['baseline']:.0f} seconds",
        f"{catalogue['p50']:.1f} ms at the median with a catalogue reference and {uploaded['p50']:.1f} ms with an uploaded one",
        f"(p95 {catalogue['p95']:.1f} and {uploaded['p95']:.1f})",
        f"within {run['embedding_max_abs_diff']:.1e}".replace("e-0", "e-"),
        *(f"{points(found['value'])} ± {100 * found['margin']:.1f}" for found in map(seeds["differences"].get, ("R@10", "mAP@10"))),
    ):
        assert said in section, said
