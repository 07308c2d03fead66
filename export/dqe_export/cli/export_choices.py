"""What `dqe-export` makes where its options leave it open: for a CPU or a GPU, and in which precision."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from dqe_engine.contracts.manifest import PRECISIONS

if TYPE_CHECKING:
    from dqe_engine.contracts.manifest import Precision, Target

    from ..calibration import EvaluationData


def resolve_target(args: argparse.Namespace) -> Target:
    """What the bundle is for. Raises InputError where --target contradicts --trt."""
    from dqe_engine.errors import InputError

    if args.trt and args.target == "cpu":
        raise InputError("--target cpu contradicts --trt, whose engines run on a GPU; leave one of them out")
    return "cuda" if args.trt or args.target == "cuda" else "cpu"


def choices(precision: str | None, target: str, data: EvaluationData | None, *, trt: bool = False) -> list[tuple[Precision, str]]:
    """Precisions to try in this order, each with its reason."""
    if precision is None and trt:
        why = "an engine computes in its graph's precision, and float32, for which TF32 is off, leaves the tensor cores idle"
        return [("float16", f"float16, the default with --trt, because {why}; --precision f32 keeps it.")]
    if precision != "auto":
        return [(PRECISIONS[precision or "f32"], "")]
    if target == "cuda":
        return [("float16", "float16, because GPUs multiply it twice as fast or faster and its weights lose nothing that can be seen.")]
    if data is None:
        return [("float32", "float32, because int8 needs an evaluation set to be judged by.")]
    return [
        ("int8", "int8, the fastest on a CPU, because the data shows that it keeps the recall."),
        ("float32", "float32, because int8 did not pass."),
    ]
