"""The pages' figures of the ablation are those of the committed results."""

from __future__ import annotations

import re
from functools import reduce
from pathlib import Path
from typing import Any

from dqe_engine.contracts.versioned import read_document
from dqe_engine.errors import InputError
from dqe_training.ablation.comparison import Comparison
from dqe_training.ablation.table import PER_CENT, interval
from dqe_training.config.schema import LossConfig, OptimConfig, TRNSConfig

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "amd-epyc-2-cores" / "method-garments.json"
COLUMNS = ("recall_at_10", "map_at_10", "attribute_precision_at_10", "near_confusion", "heldout_recall_at_10", "valid_above_wrong")


def rows(page: str, head: str) -> dict[str, list[str]]:
    """First cell -> the others, of the table whose header starts so."""
    lines = page[page.index(head) :].split("\n\n")[0].splitlines()[2:]
    return {first: rest for first, *rest in ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)}


def test_the_methods_tables_are_the_results() -> None:
    page, written = (ROOT / "docs" / "method.md").read_text(), RESULTS.with_suffix(".md").read_text()
    arms = {arm.label: arm for arm in read_document(Comparison, RESULTS, remedy="git restore it", error=InputError).arms}
    found = rows(page, "| points from `+pool`")
    assert len(found) == 12
    for said, cells in found.items():
        arm = arms[max((label for label in arms if said.startswith(label)), key=len)]
        assert cells == [interval(arm.differences[name], PER_CENT) for name in COLUMNS], said
    added = {said: cells[1:] for said, cells in rows(written, "| other pairs | seeds").items()}
    shown = {said.partition(": ")[0]: cells for said, cells in rows(page, "| other pairs").items()}
    assert {said: cells for said, cells in shown.items() if said in added} == added
    readme = (ROOT / "README.md").read_text()
    for said, wanted in (
        ("| four pools, ", ["+law:constant, from +pool, drawn as today"]),
        ("| weights that read the text", ["+law:unlabelled, from +law:constant"]),
        ("| a nameless attention pool", ["+pool, drawn as today, from baseline"]),
    ):
        line = next(line for line in readme.splitlines() if line.startswith(said))
        assert all(added[pair][0].strip("*") in line for pair in wanted), line
    for said, label in (
        ("| four pools, ", "+law:constant"),
        ("| target relative negatives", "+pool+trns:pooled"),
        ("| the KL loss", "+pool+kl"),
    ):
        line = next(line for line in readme.splitlines() if line.startswith(said))
        assert interval(arms[label].differences["recall_at_10"], PER_CENT).strip("*") in line, line


def test_the_settings_are_the_defaults() -> None:
    defaults: dict[str, Any] = {"loss": LossConfig(), "trns": TRNSConfig(), "optim": OptimConfig()}
    found = rows((ROOT / "docs" / "method.md").read_text(), "| setting | default")
    assert len(found) == 8
    for names, (values, *_) in found.items():
        for setting, said in zip(re.findall(r"`(\w+\.[\w.]+)`", names), values.split(", "), strict=True):
            section, *path = setting.split(".")
            assert str(reduce(getattr, path, defaults[section])) == said, setting
