"""What is measured: a bundle, the checkpoint that it was exported from, and a dataset's gallery and queries."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from dqe_engine.bundle import Bundle
from dqe_engine.errors import IndexFormatError, InputError
from dqe_engine.files import atomic_write, sha256_of
from dqe_training.evaluation.protocol import EvaluationSet, load_evaluation_set

from .. import machine
from ..report import save_text

if TYPE_CHECKING:
    from dqe_engine.engine import RetrievalEngine

Precision = Literal["f32", "int8"]
Kind = Literal["catalogue", "uploaded"]
KINDS: tuple[Kind, ...] = ("catalogue", "uploaded")
_DEMO = "run `make demo` (4 to 11 minutes on two cores) first, or pass --bundle, --checkpoint and --data"

Reference = str | bytes


@dataclass(frozen=True, slots=True)
class Setting:
    """Paths and sizes; picklable, so that a process of its own opens the same. Indexes and an int8 bundle lie under `work`."""

    bundle: Path
    checkpoint: Path
    data: Path
    work: Path
    items: int
    """The first of the dataset's gallery."""
    pool: int
    """Queries to draw batches from."""
    threads: int
    k: int = 10
    int8_missing: str | None = None
    """Why there is no int8 bundle; None where there is."""

    def bundle_of(self, precision: Precision) -> Path:
        return self.bundle if precision == "f32" else self.work / "bundle-int8"

    def index_of(self, precision: Precision) -> Path:
        return self.work / f"index-{precision}-{self.items}"

    @property
    def targets_file(self) -> Path:
        """(N, M, D) float32: what the float32 index searches, for peers to load."""
        return self.work / f"targets-{self.items}.npy"

    @property
    def images_file(self) -> Path:
        """(N, P, Hv) float16: the image tokens that the index caches."""
        return self.work / f"images-{self.items}.npy"

    @property
    def ids_file(self) -> Path:
        """JSON list of the items' ids."""
        return self.work / f"ids-{self.items}.json"

    def truth_file(self, kind: Kind) -> Path:
        """(Q, N) float64 scores of the pool's queries as PyTorch encodes them; references by id score -inf."""
        return self.work / f"truth-{kind}-{self.items}-{self.pool}.npy"


@dataclass(frozen=True, slots=True, eq=False)
class Workload:
    """A gallery and a pool of queries."""

    ids: tuple[str, ...]
    rows: NDArray[np.int64]  # (Q,) positions of the references in `ids`
    texts: tuple[str, ...]
    photos: tuple[bytes, ...]  # the references' files
    position: dict[str, int]

    def batch(self, kind: Kind, number: int, size: int) -> tuple[list[Reference], list[str]]:
        """References and texts of the `number`th batch; the pool is gone through again and again."""
        chosen = [at % len(self.texts) for at in range(number * size, (number + 1) * size)]
        references: list[Reference] = [self.photos[at] if kind == "uploaded" else self.ids[self.rows[at]] for at in chosen]
        return references, [self.texts[at] for at in chosen]


def open_setting(bundle: Path, checkpoint: Path, data: Path, work: Path, *, items: int, pool: int, threads: int) -> Setting:
    """Check that everything is there. Raises InputError, with what to run, and what `Bundle.load` raises."""
    for path, what, file in (
        (bundle, "bundle", "manifest.json"),
        (checkpoint, "checkpoint", "checkpoint.json"),
        (data, "data", "val.jsonl"),
    ):
        if not (path / file).is_file():
            raise InputError(f"--{what} {path}: no {file} there; {_DEMO}")
    evaluation = load_evaluation_set(data)
    items = min(items, len(evaluation.gallery))
    pool = min(pool, int(np.count_nonzero(evaluation.reference < items)))
    if not pool:
        raise InputError(f"--data {data}: no query has its reference among the first {items} gallery images; take more items")
    Bundle.load(bundle)
    folder = work / sha256_of(bundle / "manifest.json")[:16]  # the attribute heads count too, which no model hash knows
    return Setting(bundle, checkpoint, data, folder, items, pool, threads)


def prepare(setting: Setting, step: Callable[[str], None], *, int8: bool = True) -> Setting:
    """Write what is not there yet: an int8 bundle, an index of each bundle, the arrays that peers load. Not timed."""
    setting.work.mkdir(parents=True, exist_ok=True)
    step("exporting int8")
    setting = replace(setting, int8_missing=_export_int8(setting) if int8 else "left out")
    precisions: tuple[Precision, ...] = ("f32",) if setting.int8_missing else ("f32", "int8")
    for precision in precisions:
        step(f"indexing {setting.items:,} images in {precision}")
        _build_index(setting, precision)
    if not all(path.exists() for path in (setting.ids_file, setting.targets_file, setting.images_file)):
        from dqe_engine.index import GalleryIndex

        index = GalleryIndex.load(setting.index_of("f32"))
        save_array(setting.targets_file, np.stack([index.target_tokens(id) for id in index.ids]))
        save_text(setting.ids_file, json.dumps(index.ids))
        save_array(setting.images_file, np.stack([index.image_tokens(id).astype(np.float16) for id in index.ids]))
    return setting


@cache
def workload(setting: Setting) -> Workload:
    """Loaded once a process."""
    evaluation = _evaluation(setting)
    (chosen,) = np.nonzero(evaluation.reference < setting.items)
    chosen = chosen[: setting.pool]
    ids = evaluation.gallery[: setting.items]
    rows = evaluation.reference[chosen]
    return Workload(
        ids=ids,
        rows=rows,
        texts=tuple(evaluation.records[at].text for at in chosen),
        photos=tuple((setting.data / "images" / ids[row]).read_bytes() for row in rows),
        position={id: at for at, id in enumerate(ids)},
    )


@cache
def engine(setting: Setting, precision: Precision, provider: Literal["cpu", "cuda"] = "cpu") -> RetrievalEngine:
    """With the setting's index attached; one a process."""
    from dqe_engine.engine import RetrievalEngine

    threads = None if setting.threads == machine.cores() else setting.threads  # by default, it chooses how many are worth waking
    found = RetrievalEngine.load(setting.bundle_of(precision), provider=provider, threads=threads, kept_bytes=0)
    found.load_index(setting.index_of(precision))
    return found


def _evaluation(setting: Setting) -> EvaluationSet:
    return load_evaluation_set(setting.data)


def _export_int8(setting: Setting) -> str | None:
    """Export with dqe-export, in a process of its own; why there is no bundle, if so. A gate that it fails is such a reason."""
    out = setting.bundle_of("int8")
    if out.exists():
        return None
    command = [str(Path(sys.executable).parent / "dqe-export"), str(setting.checkpoint), str(out), "--precision", "int8"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return None
    said = done.stderr.strip().splitlines()
    return f"not exported: {said[-1] if said else f'dqe-export ended with code {done.returncode}'}"


def _build_index(setting: Setting, precision: Precision) -> None:
    from dqe_engine.engine import RetrievalEngine
    from dqe_engine.index import GalleryIndex

    path, bundle = setting.index_of(precision), Bundle.load(setting.bundle_of(precision))
    try:
        if len(GalleryIndex.load(path, model_hash=bundle.model_hash)) == setting.items:
            return
    except IndexFormatError:  # none yet, or another model's
        pass
    built = RetrievalEngine.load(setting.bundle_of(precision), provider="cpu", threads=setting.threads)
    ids = _evaluation(setting).gallery[: setting.items]
    built.index_images({id: setting.data / "images" / id for id in ids})
    built.save_index(path, overwrite=True)


def save_array(path: Path, array: NDArray[np.float32] | NDArray[np.float16] | NDArray[np.float64]) -> None:
    with atomic_write(path) as stream:
        np.save(stream, array)
