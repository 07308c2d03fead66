"""`dqe-index`: an index brought up to date with a folder of images; interrupted or killed, it goes on where it stopped."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .index_tools import METADATA_RULES, TOOLS, conflicts_told, run_tool
from .long_work import interrupts_between_batches, progress_bar
from .main import EXIT_INTERRUPTED, add_runtime_options, positive, run

if TYPE_CHECKING:
    from dqe_engine.engine import RetrievalEngine
    from dqe_engine.indexer import Entry, IndexingPlan, Pairs
    from dqe_engine.results import IndexingReport

SHOWN_SKIPPED = 20


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dqe-index",
        description=(
            "Bring an index up to date with a folder of images: new ones are added, those whose content changed are embedded anew and "
            "keep their metadata. An item's id is its path relative to the folder."
        ),
        epilog=f"Commands for an existing index: dqe-index {{{','.join(TOOLS)}}} --help. A bundle of such a name is ./NAME.",
    )
    parser.add_argument("bundle", type=Path, help="the exported model: a folder, or hf://OWNER/NAME@REVISION")
    parser.add_argument(
        "images",
        type=Path,
        help="folder of images, searched at any depth for JPEG, PNG, WebP, GIF, BMP, TIFF and AVIF, whatever their names",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="INDEX", help="folder of the index; made if it is missing, else brought up to date"
    )
    parser.add_argument(
        "--prefix", default="", metavar="NAME/", help="put this before the ids, so that several folders can be in one index"
    )
    parser.add_argument("--metadata", type=Path, metavar="FILE", help=METADATA_RULES)
    parser.add_argument("--ignore-unknown", action="store_true", help="ignore metadata whose id is neither an image's nor in the index")
    parser.add_argument("--batch-size", type=positive, default=32, metavar="N", help="images per pass (default: 32)")
    parser.add_argument("--save-every", type=positive, default=512, metavar="N", help="save after every N images (default: 512)")
    parser.add_argument("--storage", choices=("f32", "f16"), help="precision of the target tokens of a new index (default: f32)")
    parser.add_argument(
        "--image-tokens",
        choices=("f16", "f32", "none"),
        help="precision of the image tokens, which an item needs to be a reference; none leaves them out (default for a new index: f16)",
    )
    parser.add_argument("--skip-bad", action="store_true", help="skip images that cannot be read, and list them at the end")
    parser.add_argument(
        "--ray",
        action="store_true",
        help="encode on the Ray cluster of RAY_ADDRESS, or on one that starts on this machine (docs/training-at-scale.md)",
    )
    parser.add_argument("--ray-workers", type=positive, metavar="N", help="with --ray: number of processes that encode (default: 2)")
    parser.add_argument(
        "--prune", action="store_true", help="remove items whose image is gone from the folder; with --prefix, only items of that prefix"
    )
    parser.add_argument("--yes", action="store_true", help="let --prune remove more than half of the items")
    parser.add_argument("--add-only", action="store_true", help="refuse to change items that are in the index")
    parser.add_argument(
        "--rehash", action="store_true", help="embed again the images that were indexed before content hashes were recorded"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be done; images are read, nothing is embedded or written")
    parser.add_argument(
        "--force",
        action="store_true",
        help="make the index anew; it replaces the old one when it is complete, and keeps the metadata of ids that stay",
    )
    add_runtime_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given and given[0] in TOOLS:
        return run(lambda: run_tool(given))
    return run(lambda: _index(build_parser().parse_args(given)))


@dataclass(frozen=True)
class _Wanted:
    """What the index is to hold."""

    pairs: Pairs
    metadata: Mapping[str, Entry]


def _index(args: argparse.Namespace) -> int:
    from dqe_engine.engine import RetrievalEngine
    from dqe_engine.errors import InputError
    from dqe_engine.image_sources import find_images
    from dqe_engine.index.metadata_file import read_metadata

    if args.ray_workers is not None and not args.ray:
        raise InputError(f"--ray-workers {args.ray_workers} has no effect without --ray; add --ray, or leave it out")
    if args.force and args.prefix:
        raise InputError(
            f"--force replaces the whole index, --prefix {args.prefix} stands for a part of it; leave one of them out, or name a new --out"
        )
    metadata = {} if args.metadata is None else read_metadata(args.metadata)
    found = find_images(args.images)
    if not found.pairs:
        raise InputError(f"{args.images}: no images in this folder ({found.describe_passed_over() or 'it is empty'})")
    wanted = _Wanted([(args.prefix + id, image) for id, image in found.pairs], metadata)
    engine = RetrievalEngine.load(args.bundle, provider=args.provider, threads=args.threads)
    fill = _replace_index if args.force and (args.out / "manifest.json").exists() else _continue_index
    report = fill(engine, wanted, args)
    if report is None:
        return EXIT_INTERRUPTED
    for image in report.skipped[:SHOWN_SKIPPED]:
        print(f"skipped: {image.reason}", file=sys.stderr)
    if len(report.skipped) > SHOWN_SKIPPED:
        print(f"skipped: {len(report.skipped) - SHOWN_SKIPPED} more", file=sys.stderr)
    end = "nothing was written" if args.dry_run else f"{len(engine.index)} in the index"
    print(f"{args.out}: {replace(report, passed_over=found.passed_over).describe()}; {end}")
    return 0


def _continue_index(engine: RetrievalEngine, wanted: _Wanted, args: argparse.Namespace) -> IndexingReport | None:
    """Bring the index in `--out` up to date, saving as it goes. None after Ctrl-C."""
    try:
        with conflicts_told(args.out):
            _open_index(engine, args)
            if not args.dry_run:
                engine.save_index(args.out)  # before the work: a folder that cannot be written is an error now
            return _bring_up_to_date(engine, wanted, args, args.out)
    except KeyboardInterrupt:
        kept = f"finished shards stay in {_shards(args)}" if args.ray else f"{len(engine.index)} images are saved in {args.out}"
        print(f"interrupted: {kept}; run the same command to go on", file=sys.stderr)
        return None


def _replace_index(engine: RetrievalEngine, wanted: _Wanted, args: argparse.Namespace) -> IndexingReport | None:
    """Build anew beside `--out` and put that in the old index's place when it is complete; until then the old one stays."""
    from dqe_engine.errors import InputError
    from dqe_engine.files import scratch_directory
    from dqe_engine.index.storage import writing

    ids = {id for id, _ in wanted.pairs}
    before = _metadata_before(args)
    wanted = _Wanted(wanted.pairs, {id: entry for id, entry in before.items() if id in ids} | dict(wanted.metadata))
    pruned = tuple(id for id in before if id not in ids)
    _new_index(engine, args)
    if args.dry_run:
        return replace(_bring_up_to_date(engine, wanted, args, args.out), pruned=pruned)
    with writing(args.out):  # before the work, as above
        pass
    with scratch_directory(args.out) as place:
        try:
            report = _bring_up_to_date(engine, wanted, args, place)
        except KeyboardInterrupt:
            print(f"interrupted: {args.out} is as it was; run the same command to start again", file=sys.stderr)
            return None
        if not len(engine.index):
            raise InputError(
                f"{args.images}: none of the images can be read, and {args.out} was not changed; leave out --skip-bad to see why"
            )
        engine.save_index(args.out, overwrite=True)
    return replace(report, pruned=pruned)


def _metadata_before(args: argparse.Namespace) -> dict[str, Entry]:
    """By id, of all items of the index in `--out`."""
    from dqe_engine.errors import IndexFormatError
    from dqe_engine.index import GalleryIndex

    try:
        with GalleryIndex.load(args.out) as index:
            return {item.id: item.metadata for item in index}
    except IndexFormatError as error:
        print(f"no metadata is kept: {error}", file=sys.stderr)
        return {}


def _open_index(engine: RetrievalEngine, args: argparse.Namespace) -> None:
    """Attach the index in `--out`, or an empty one where there is none."""
    from dqe_engine.errors import InputError

    if not (args.out / "manifest.json").exists():
        _new_index(engine, args)
        return
    engine.load_index(args.out)
    for option, asked, found in (
        ("--storage", args.storage, engine.index.storage),
        ("--image-tokens", args.image_tokens, engine.index.image_storage),
    ):
        if asked is not None and asked != found:
            raise InputError(f"{args.out} was made with {option} {found}; leave {option} out, or start anew with --force")


def _new_index(engine: RetrievalEngine, args: argparse.Namespace) -> None:
    engine.new_index(storage=args.storage or "f32", image_storage=args.image_tokens or "f16")


def _bring_up_to_date(engine: RetrievalEngine, wanted: _Wanted, args: argparse.Namespace, place: Path) -> IndexingReport:
    """The attached index, saved to `place` every `--save-every`. Raises KeyboardInterrupt between two batches."""
    indexer, on_error = engine.indexer(), _on_error(args)
    with interrupts_between_batches() as check_stopped, progress_bar("comparing") as show:

        def compared(done: int, total: int) -> None:
            show(done, total)
            check_stopped()

        plan = indexer.plan(
            wanted.pairs,
            metadata=wanted.metadata,
            ignore_unknown=args.ignore_unknown,
            add_only=args.add_only,
            rehash=args.rehash,
            prune=args.prefix if args.prune else None,
            on_error=on_error,
            progress=compared,
        )
    if not args.dry_run:
        _check_pruning(engine, plan, args)
        indexer.prepare(plan, save=lambda: engine.save_index(place))
        engine.save_index(place)
    if args.ray and not args.dry_run:
        return _embed_on_ray(engine, plan, args, place)
    saved = 0
    with interrupts_between_batches() as check_stopped, progress_bar("indexing") as show:

        def embedded(done: int, total: int) -> None:
            nonlocal saved
            show(done, total)
            if done - saved >= args.save_every and not args.dry_run:
                engine.save_index(place)
                saved = done
            check_stopped()

        try:
            return indexer.embed(plan, batch_size=args.batch_size, on_error=on_error, progress=embedded, dry_run=args.dry_run)
        finally:  # what was added before a bad image or Ctrl-C is kept too
            if not args.dry_run:
                engine.save_index(place)


def _on_error(args: argparse.Namespace) -> Any:
    return "skip" if args.skip_bad else "raise"


def _check_pruning(engine: RetrievalEngine, plan: IndexingPlan, args: argparse.Namespace) -> None:
    """Raise InputError where more than half of what can be removed would be, and nobody said --yes."""
    from dqe_engine.errors import InputError

    gone, all_of_them = len(plan.report.pruned), sum(id.startswith(args.prefix) for id in engine.index.ids)
    if 2 * gone > all_of_them and not args.yes:
        where = f"{args.out} under {args.prefix}" if args.prefix else f"{args.out}"
        raise InputError(
            f"--prune would remove {gone} of the {all_of_them} items in {where}, whose images are not in {args.images}; if it is "
            "the right folder, add --yes; to index a second folder, give it a --prefix"
        )


def _shards(args: argparse.Namespace) -> Path:
    out: Path = args.out.absolute()
    return out.with_name(f"{out.name}.shards")


def _embed_on_ray(engine: RetrievalEngine, plan: IndexingPlan, args: argparse.Namespace, place: Path) -> IndexingReport:
    """What is to be embedded, by a Ray cluster: shards of `--save-every` images in a folder beside `--out`, then merged. Interrupted,
    the finished shards stay there and nothing is added."""
    from dqe_engine.indexer import without_skipped
    from dqe_engine.ray_indexing import ShardJob, encode_shards, file_stamp, merge_shards

    files = [(id, path, file_stamp(path)) for id, image in plan.to_embed for path in [str(Path(str(image)).absolute())]]
    jobs = [
        ShardJob(
            images=tuple(files[start : start + args.save_every]), storage=engine.index.storage, image_storage=engine.index.image_storage,
            batch_size=args.batch_size, skip_bad=args.skip_bad,
        )
        for start in range(0, len(files), args.save_every)
    ]  # fmt: skip
    shards = _shards(args)
    done = 0
    with progress_bar("indexing") as show:

        def advance(images: int) -> None:
            nonlocal done
            done += images
            show(done, len(files))

        encode_shards(
            engine.bundle.path, jobs, shards, workers=args.ray_workers or 2, provider=args.provider, threads=args.threads, done=advance
        )
    return without_skipped(plan.report, merge_shards(engine.index, jobs, shards, place, plan.metadata))
