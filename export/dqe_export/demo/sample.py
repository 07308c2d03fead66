"""The sample that ships with the package, from what `make demo` made: `python -m dqe_export.demo.sample demo --out dqe_engine/sample`.

It writes OUT/bundle and OUT/photos, replacing those that are there. The same demo gives the same files.
"""

from __future__ import annotations

import argparse
import shutil
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import msgspec

from dqe_engine.contracts.manifest import PRECISIONS, REPORT_FILES, BundleManifest, Precision
from dqe_engine.contracts.vocabulary import AttributeVocabulary
from dqe_engine.errors import ExportError, InputError
from dqe_engine.files import atomic_directory, describe_write_error
from dqe_engine.sample import METADATA_FILE
from dqe_training.checkpointing.checkpoint import load_checkpoint
from dqe_training.cli.runner import run_torch
from dqe_training.data.records import ImageRecord, read_jsonl

from ..bundle import ExportOptions, export_bundle
from ..calibration import EvaluationData
from .shop import shop_metadata

_GALLERY = "gallery/"
_ATTRIBUTES = ("colour", "shape", "pattern", "length")


def choose_photos(images: Sequence[ImageRecord], vocabulary: AttributeVocabulary) -> list[ImageRecord]:
    """One image of every colour, shape and pattern that `images` have, the first of its length. Lengths take turns, so that each is as
    frequent as the others with every colour, shape and pattern; where there is no image of a length, the next one's turn comes."""
    by_attributes: dict[tuple[str, ...], list[ImageRecord]] = defaultdict(list)
    for image in images:
        by_attributes[tuple(image.attributes[name] for name in _ATTRIBUTES)].append(image)
    values = {attribute.name: attribute.values for attribute in vocabulary.attributes}
    colours, shapes, patterns, lengths = (values[name] for name in _ATTRIBUTES)
    chosen = []
    for c, colour in enumerate(colours):
        for s, shape in enumerate(shapes):
            for p, pattern in enumerate(patterns):
                turns = [lengths[(c + s + p + turn) % len(lengths)] for turn in range(len(lengths))]
                found = [by_attributes[colour, shape, pattern, length] for length in turns]
                chosen += [candidates[0] for candidates in found if candidates][:1]
    return chosen


def write_sample(demo: Path, out: Path, *, precision: Precision = "int8") -> BundleManifest:
    """Write OUT/bundle and OUT/photos from the folder of a finished demo. Raises InputError, ExportError and ParityError."""
    dataset, model = demo / "garments", demo / "runs" / "dqe-0" / "model"
    if not model.is_dir():
        raise InputError(f"{model}: no such folder; run `make demo` first, or name what it made")
    checkpoint = load_checkpoint(model)
    images = [r for r in read_jsonl(dataset / "images.jsonl", ImageRecord) if r.image.startswith(_GALLERY)]
    chosen = choose_photos(images, checkpoint.vocabulary)
    options = ExportOptions(name="sample", precision=precision, data=EvaluationData.open(dataset))
    manifest = export_bundle(checkpoint, out / "bundle", options, force=True)
    for name in REPORT_FILES:  # timings of this machine, and no part of the bundle
        (out / "bundle" / name).unlink(missing_ok=True)
    _write_photos(chosen, dataset / "images", out / "photos")
    return manifest


def _write_photos(chosen: Sequence[ImageRecord], images: Path, out: Path) -> None:
    entries = shop_metadata(chosen)
    try:
        with atomic_directory(out, replace=True, marker=METADATA_FILE) as temporary:
            lines = []
            for record in sorted(chosen, key=lambda record: record.image):
                name = Path(record.image).name
                shutil.copyfile(images / record.image, temporary / name)
                lines.append(msgspec.json.encode({"id": name, **entries[record.image]}))
            (temporary / METADATA_FILE).write_bytes(b"\n".join(lines) + b"\n")
    except OSError as error:
        raise ExportError(describe_write_error(error, out)) from error


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m dqe_export.demo.sample", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("demo", type=Path, help="folder of a finished `make demo`")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="bundle/ and photos/ in it are replaced")
    parser.add_argument("--precision", choices=("f32", "f16", "int8"), default="int8", help="of the bundle (default: int8)")
    return parser


def _write(args: argparse.Namespace) -> int:
    manifest = write_sample(args.demo, args.out, precision=PRECISIONS[args.precision])
    if (found := manifest.retrieval) is not None:
        print(f"recall@10 {100 * found.bundle_recall_at_10:.1f} % ({found.difference:+.2f} points from PyTorch), top 10 overlap "
              f"{100 * found.top10_overlap:.1f} %, {found.queries} queries over {found.gallery} images")  # fmt: skip
    for folder in ("bundle", "photos"):
        files = list((args.out / folder).iterdir())
        print(f"{args.out / folder}: {len(files)} files, {sum(file.stat().st_size for file in files) / 1e6:.2f} MB")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run_torch(lambda: _write(build_parser().parse_args(argv)))


if __name__ == "__main__":
    raise SystemExit(main())
