"""dqe-reproduce over the real annotations, with made-up images and the toy weights that the public classes wrote."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
from support.published_models import write_vocabulary
from support.samples import noise_image

from dqe_export.reproduce import Wish, reproduce
from dqe_export.reproduce.work import find_annotations, plan_work
from dqe_training.data.image_folder import ImageFolder
from dqe_training.data.public.base import Options
from dqe_training.importing import ImportOptions

pytestmark = pytest.mark.realdata

EXPECTED = {
    "fashioniq": {
        "gallery `original`": ({"dress": 2017, "shirt": 2038, "toptee": 1961}, {"dress": 3817, "shirt": 6346, "toptee": 5373}),
        "gallery `val`": ({"dress": 2017, "shirt": 2038, "toptee": 1961}, {"dress": 2628, "shirt": 3089, "toptee": 2902}),
    },
    "cirr": {"val": ({"val": 4181}, {"val": 2297}), "test1": ({"test1": 4148}, {"test1": 2315})},
    "circo": {"val": ({"val": 220}, None), "test": ({"test": 800}, None)},
}
"""By the view's name without its reference: queries and images of its sets; CIRCO's list of images is not among the files."""


class Silent:
    def say(self, text: str) -> None: ...
    def stage(self, text: str) -> None: ...
    def count(self, what: str, done: int, total: int) -> None: ...
    def interruptible(self) -> nullcontext:
        return nullcontext(lambda: None)


def named(dataset: str, folder: Path) -> Iterator[str]:
    """Every image that val and the test split name."""
    benchmark = find_annotations(dataset, folder, folder)
    known = ImageFolder(folder, {f"{0:012d}": ""}) if dataset == "circo" else None
    for split in benchmark.splits:
        for queries in benchmark.query_sets(split, Options(), known):
            yield from (id for id in queries.gallery if dataset != "circo" or int(id))


@pytest.mark.parametrize("dataset", list(EXPECTED))
def test_the_real_annotations_go_through(dataset: str, realdata: Path, tmp_path: Path) -> None:
    source = realdata / "published" / "qure_vitl_tiny.pth"
    if not source.is_file():
        pytest.skip(f"no toy-size published checkpoint at {source}; set DQE_REALDATA")
    made = [tmp_path / f"{seed}.png" for seed in range(40)]
    for seed, path in enumerate(made):
        noise_image(seed, (32, 32)).save(path)
    (tmp_path / "images").mkdir()
    for at, id in enumerate(sorted(set(named(dataset, realdata / dataset)))):
        os.link(made[at % len(made)], tmp_path / "images" / f"{id}.png")

    whole = plan_work(find_annotations(dataset, realdata / dataset, tmp_path), tmp_path / "images")
    for one in whole.seen:
        queries, galleries = EXPECTED[dataset][one.view.name.rpartition(", ")[0]]
        assert {part.name: len(part) for part in one.sets} == queries
        assert galleries is None or {part.name: len(part.gallery) for part in one.sets} == galleries
    assert len(whole.seen) == (4 if dataset == "fashioniq" else 2)

    importing = ImportOptions(tokenizer=str(write_vocabulary(tmp_path / "vocab.txt", 120)), vision_heads=4, qformer_heads=4)
    outcome = reproduce(
        Wish(
            dataset, source, tmp_path / "images", realdata / dataset, out=tmp_path / "out", importing=importing, limit=8, rows=("pytorch",)
        ),
        Silent(),
    )
    assert all(0 <= figure.value <= 1 for view in outcome.results.views for figure in view.rows["pytorch"].figures.values())
    assert "QuRe" in outcome.table
