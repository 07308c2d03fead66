"""What is measured: a checkpoint, the bundles exported from it, and a dataset's gallery and queries."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from dqe_engine.bundle import Bundle
from dqe_engine.engine import RetrievalEngine
from dqe_engine.errors import InputError
from dqe_training.checkpointing.checkpoint import load_checkpoint
from dqe_training.data.records import ImageRecord, TripletRecord, read_jsonl
from dqe_training.evaluation.protocol import Embeddings, EvaluationSet, evaluation_set
from dqe_training.evaluation.pytorch import encode_gallery_images, evaluate_model
from dqe_training.evaluation.runtime import evaluate_engine, index_gallery

Precision = Literal["f32", "f16", "int8"]
PRECISIONS: tuple[Precision, ...] = ("f32", "f16", "int8")
REFERENCE = "PyTorch float32"
MODELS = (REFERENCE, *(f"bundle {precision}" for precision in PRECISIONS))
_REMEDY = "run `make demo` (4 to 11 minutes on two cores), or pass --bundle, --checkpoint and --data"
_SAME_MODEL = 1e-3
"""Embeddings of a float32 bundle and of its checkpoint differ by some 1e-6; those of another model by some tenths."""

Step = Callable[[str], None]


class NotExportedError(InputError):
    """There is no bundle of that precision; the message says why, for example dqe-export's last line."""


@dataclass
class Setting:
    """Open with `open_setting`. What was encoded is kept, so that sections share it."""

    bundle: Path
    checkpoint: Path
    data: Path
    work: Path
    """For bundles that are exported here; below it a folder per checkpoint."""
    exports: bool
    """False: take only bundles that are there."""
    evaluation: EvaluationSet
    step: Step
    _encoded: dict[str, Embeddings] = field(default_factory=dict)

    def embeddings(self, model: str) -> Embeddings:
        """Of one of `MODELS`: queries, target tokens and rankings of the evaluation set. Raises NotExportedError."""
        if model not in self._encoded:
            self._encoded[model] = self._in_pytorch() if model == REFERENCE else self._in_runtime(model)
        return self._encoded[model]

    def bundle_of(self, precision: Precision) -> Path:
        """The bundle that was given where it has this precision, else one exported here, once. Raises NotExportedError."""
        wanted = {"f32": "float32", "f16": "float16", "int8": "int8"}[precision]
        if Bundle.load(self.bundle).manifest.precision == wanted:
            return self.bundle
        out = self.work / _digest(self.checkpoint / "model.safetensors") / f"bundle-{precision}"
        if not out.exists():
            if not self.exports:
                raise NotExportedError("--quick exports nothing; run once without it")
            self.step(f"exporting {precision}")
            out.parent.mkdir(parents=True, exist_ok=True)
            command = [str(Path(sys.executable).parent / "dqe-export"), str(self.checkpoint), str(out), "--precision", precision]
            if precision == "int8":
                command += ["--data", str(self.data)]  # what is sensitive to 8 bits is found on real inputs
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                said = done.stderr.strip().splitlines()
                raise NotExportedError(said[-1] if said else f"dqe-export ended with code {done.returncode}")
        return out

    def _in_pytorch(self) -> Embeddings:
        loaded = load_checkpoint(self.checkpoint)
        self.step(f"{REFERENCE}: encoding {len(self.evaluation.gallery):,} images")
        tokens = encode_gallery_images(loaded.model, self.data / "images", self.evaluation)
        return evaluate_model(loaded.model, loaded.tokenizer, self.evaluation, tokens)[1]

    def _in_runtime(self, model: str) -> Embeddings:
        path = self.bundle_of(next(precision for precision in PRECISIONS if model.endswith(precision)))
        engine = RetrievalEngine.load(path, provider="cpu")
        self.step(f"{model}: encoding {len(self.evaluation.gallery):,} images")
        index_gallery(engine, self.data / "images", self.evaluation)
        return evaluate_engine(engine, self.evaluation)[1]

    def check_same_model(self) -> None:
        """Raise InputError unless the float32 bundle's embeddings are the checkpoint's."""
        ours, theirs = self.embeddings(REFERENCE), self.embeddings("bundle f32")
        if ours.queries.shape == theirs.queries.shape and np.abs(ours.queries - theirs.queries).max() <= _SAME_MODEL:
            return
        raise InputError(
            f"--bundle {self.bundle} answers otherwise than --checkpoint {self.checkpoint}; pass the checkpoint it was exported from"
        )


def open_setting(
    bundle: Path, checkpoint: Path, data: Path, work: Path, *, queries: int, items: int, exports: bool = True,
    step: Step = lambda text: None,
) -> Setting:  # fmt: skip
    """The first `queries` of the dataset, over the images that they name and others up to `items`.

    Raises InputError where something is missing, with what to run.
    """
    for path, option, file in (
        (bundle, "bundle", "manifest.json"),
        (checkpoint, "checkpoint", "checkpoint.json"),
        (data, "data", "val.jsonl"),
    ):
        if not (path / file).is_file():
            raise InputError(f"--{option} {path}: no {file} there; {_REMEDY}")
    return Setting(bundle, checkpoint, data, work, exports, part_of(data, queries, items), step)


def part_of(data: Path, queries: int, items: int) -> EvaluationSet:
    """See `open_setting`; the whole dataset where it is no larger."""
    records = read_jsonl(data / "val.jsonl", TripletRecord)[:queries]
    images = [image for image in read_jsonl(data / "images.jsonl", ImageRecord) if image.image.startswith("gallery/")]
    needed = {name for record in records for name in (record.reference, record.target)}
    spare = max(items - len(needed), 0)
    others = {image.image for image in [i for i in images if i.image not in needed][:spare]}
    return evaluation_set(records, [image for image in images if image.image in needed | others], where=str(data))


def _digest(path: Path) -> str:
    if not path.is_file():
        raise InputError(f"{path.parent}: no {path.name} there; pass a checkpoint that dqe-train wrote")
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:12]
