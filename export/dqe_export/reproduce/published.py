"""Published results, as docs/benchmarks.md has them: what a run's own table is held against. Per cent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dqe_engine.errors import InputError

SOURCES: Mapping[int, str] = {
    1: "Baldrati et al., CLIP4Cir (task-oriented fine-tuning of CLIP and a combiner).",
    2: "Bai et al., Sentence-level Prompts Benefit Composed Image Retrieval, ICLR 2024, arXiv 2310.05473.",
    3: "Kwak et al., QuRe: Query-Relevant Retrieval through Hard Negative Sampling in Composed Image Retrieval, ICML 2025, "
    "arXiv 2507.12416.",
    4: "Feng et al., Improving Composed Image Retrieval via Contrastive Learning with Scaling Positives and Negatives, 2024, "
    "arXiv 2404.11317.",
    5: "Yang et al., ReCALL: Recalibrating Capability Degradation for MLLM-based Composed Image Retrieval, CVPR 2026, arXiv 2602.01639.",
    6: "Ventura et al., CoVR-2.",
}
"""As they are numbered in docs/benchmarks.md."""
SPLITS = {
    "fashioniq": "val, gallery as its paper chose it",
    "cirr": "test1, which its server judges",
    "circo": "test, which its server judges; trained on CIRR",
}
"""What the published figures of a dataset are of."""


@dataclass(frozen=True)
class Published:
    """A row. `figures`: in the order of the dataset's columns. `formats`: the layouts of files that may be its weights. `tower`: "L" or
    "g", "" where the row does not say."""

    name: str
    title: str
    source: int
    figures: tuple[float, ...]
    formats: tuple[str, ...] = ()
    tower: str = ""

    @property
    def cited(self) -> str:
        return f"{self.title} [{self.source}]"


_SPRC = ("sprc",)
ROWS: Mapping[str, Sequence[Published]] = {
    "fashioniq": (
        Published("clip4cir", "CLIP4Cir", 1, (38.18, 62.67, 44.01, 64.57, 45.39, 69.56, 54.06)),
        Published("sprc-vitl", "SPRC, ViT-L", 2, (45.71, 70.00, 51.37, 72.77, 55.48, 77.46, 62.13), _SPRC, "L"),
        Published("qure-vitl", "QuRe, ViT-L", 3, (46.80, 69.81, 53.53, 72.87, 57.47, 77.77, 63.04), ("qure",), "L"),
        Published("sprc-vitg", "SPRC, ViT-g", 2, (49.18, 72.43, 55.64, 73.89, 59.35, 78.58, 64.85), _SPRC, "g"),
        Published("spn4cir", "SPN4CIR on SPRC", 4, (50.57, 74.12, 57.70, 75.27, 60.84, 79.96, 66.41), ("spn4cir",)),
        Published("recall", "ReCALL, Qwen2.5-VL-7B", 5, (51.81, 73.48, 58.49, 76.59, 60.83, 79.19, 66.73)),
    ),
    "cirr": (
        Published("clip4cir", "CLIP4Cir", 1, (42.80, 75.88, 86.26, 97.64, 70.00, 87.45, 94.99, 72.94)),
        Published("sprc-vitl", "SPRC, ViT-L", 2, (50.70, 80.65, 88.77, 97.64, 79.59, 91.90, 96.77, 80.12), _SPRC, "L"),
        Published("qure-vitl", "QuRe, ViT-L", 3, (52.22, 82.53, 90.31, 98.17, 78.51, 91.28, 96.48, 80.52), ("qure",), "L"),
        Published("sprc-vitg", "SPRC, ViT-g", 2, (51.96, 82.12, 89.74, 97.69, 80.65, 92.31, 96.60, 81.39), _SPRC, "g"),
        Published("spn4cir", "SPN4CIR on SPRC", 4, (55.06, 83.83, 90.87, 98.29, 81.54, 92.65, 97.04, 82.69), ("spn4cir",)),
        Published("recall", "ReCALL, Qwen2.5-VL-7B", 5, (55.52, 84.07, 91.83, 98.55, 81.49, 93.35, 97.64, 82.81)),
    ),
    "circo": (
        Published("sprc", "SPRC", 2, (17.57, 18.48, 20.14, 20.98), _SPRC),
        Published("covr-2", "CoVR-2", 6, (23.18, 23.59, 25.57, 26.49)),
        Published("qure", "QuRe", 3, (23.22, 24.23, 26.26, 27.24), ("qure",)),
    ),
}  # fmt: skip


def published_row(dataset: str, name: str | None, layout: str | None, tower: str) -> Published | None:
    """The row called `name`; without a name that of the weights' layout and tower, None where there is none. Raises InputError."""
    rows = ROWS[dataset]
    if name is None:
        return next((row for row in rows if layout in row.formats and row.tower in ("", tower)), None)
    if (named := next((row for row in rows if row.name == name), None)) is None:
        raise InputError(f"--published {name}: no such row of {dataset}; choose {', '.join(row.name for row in rows)}")
    return named
