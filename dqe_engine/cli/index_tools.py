"""`dqe-index stats INDEX` and its siblings: what is done with an index alone, without a model or images."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from . import tune
from .long_work import progress_bar
from .main import json_object, positive

METADATA_RULES = (
    'metadata, as JSON lines such as {"id": "a.jpg", "price": 12.5}, or as CSV with a column "id", whose other columns are keys; it takes '
    "the place of what an item had, as a whole. CSV: an empty cell is no value; a column of which every value is a number as JSON writes "
    'it (so not 007) holds numbers, one of only "true" and "false" booleans, all others strings; lists need JSON lines'
)


def run_tool(argv: Sequence[str]) -> int:
    """`argv` begins with one of `TOOLS`. Returns the exit code."""
    tool = TOOLS[argv[0]]
    parser = argparse.ArgumentParser(prog=f"dqe-index {argv[0]}", description=tool.description)
    tool.add_arguments(parser)
    return tool.run(parser.parse_args(argv[1:]))


@contextmanager
def conflicts_told(index: Path) -> Iterator[None]:
    """Another writer's save meanwhile as an error of commands: `GalleryIndex.save` names the remedies of a program."""
    from dqe_engine.errors import IndexConflictError

    try:
        yield
    except IndexConflictError as error:
        message = "another process wrote to this index meanwhile; when it is done, run the same command again to go on"
        raise IndexConflictError(f"{index}: {message}") from error


def _stats(args: argparse.Namespace) -> int:
    import msgspec

    from dqe_engine.contracts.parsing import to_json
    from dqe_engine.index import GalleryIndex

    with GalleryIndex.load(args.index) as index:
        layout = {name: getattr(index, name) for name in ("model_hash", "storage", "image_storage", "target_shape", "image_shape")}
        unrecorded = sum(item.content is None for item in index)
        sys.stdout.write(to_json({**msgspec.structs.asdict(index.stats()), "without_content_hash": unrecorded, **layout}).decode())
    return 0


def _verify(args: argparse.Namespace) -> int:
    from dqe_engine.index import GalleryIndex

    with GalleryIndex.load(args.index, verify=True) as index:
        print(f"{args.index}: {len(index)} items; all files are as they were saved")
    return 0


def _compact(args: argparse.Namespace) -> int:
    from dqe_engine.index import GalleryIndex

    with conflicts_told(args.index), GalleryIndex.load(args.index) as index:
        removed = index.stats().removed
        index.compact()
        print(f"{args.index}: dropped {removed} rows of removed and replaced items; {len(index)} items")
    return 0


def _publish(args: argparse.Namespace) -> int:
    from dqe_engine.errors import IndexFormatError, InputError
    from dqe_engine.index import GalleryIndex
    from dqe_engine.index.storage import read_manifest_to_replace

    if args.new.resolve() == args.served.resolve():
        raise InputError(f"{args.new} and {args.served} are the same folder; name the new index and the one that is served")
    with GalleryIndex.load(args.new, verify=True) as index:
        if not len(index):
            raise InputError(f"{args.new}: there are no images in this index, so it was not published; add some with dqe-index")
        served = read_manifest_to_replace(args.served)
        if served is not None and served.model_hash != index.model_hash and not args.other_model:
            raise IndexFormatError(
                f"{args.served} was made with model {served.model_hash[:12]}, {args.new} with {index.model_hash[:12]}, so "
                "running servers could not take it over; publish with --other-model, then restart them with the new bundle"
            )
        index.save(args.served, overwrite=True)
        print(f"{args.served}: {len(index)} items of {args.new}")
    return 0


def _list(args: argparse.Namespace) -> int:
    import msgspec

    from dqe_engine.index import GalleryIndex

    with GalleryIndex.load(args.index) as index:
        for item in index.snapshot().items(args.filter):
            line = msgspec.json.encode({"id": item.id, **(item.metadata or {}), "id": item.id})  # noqa: F601 (first, and not the metadata's)
            sys.stdout.write(line.decode() + "\n")
    return 0


def _metadata(args: argparse.Namespace) -> int:
    from dqe_engine.index import GalleryIndex
    from dqe_engine.index.metadata_file import read_metadata
    from dqe_engine.indexer import describe, plan_metadata

    given = read_metadata(args.file)
    with conflicts_told(args.index), GalleryIndex.load(args.index) as index:
        plan = plan_metadata(index, given, ignore_unknown=args.ignore_unknown)
        if not args.dry_run:
            describe(index, {id: plan.metadata[id] for id in plan.report.described}, save=lambda: index.save(args.index))
        end = "nothing was written" if args.dry_run else f"{len(index)} in the index"
        print(f"{args.index}: {plan.report.describe()}; {end}")
    return 0


def _sweep(args: argparse.Namespace) -> int:
    from dqe_engine.server.settings import uploads_beside
    from dqe_engine.server.uploads import sweep_uploads

    folder = args.uploads or uploads_beside(args.index)
    count = sweep_uploads(args.index, folder, delete=args.yes)
    done, remedy = ("removed", "") if args.yes else ("would remove", "; add --yes to do it, if this folder belongs to this index alone")
    print(f"{folder}: {done} {count} images that no item of {args.index} was made from{remedy}")
    return 0


def _shard(args: argparse.Namespace) -> int:
    from dqe_engine.errors import InputError
    from dqe_engine.index import GalleryIndex
    from dqe_engine.index.shard_files import SHARDS_FILE, cut_index, read_shards

    shards = args.shards
    if shards is None:
        if not (args.out / SHARDS_FILE).exists():
            raise InputError(f"{args.out}: nothing is there yet; say how many shards to cut with --shards N")
        shards = len(read_shards(args.out).shards)
    with GalleryIndex.load(args.index, screened=False) as index, progress_bar("cutting") as show:
        cut = cut_index(index, args.out, shards, anew=args.force, progress=show)
    print(f"{args.out}: {cut.items} items of {args.index} in {cut.describe()}")
    if cut.overfull:
        print(f"{args.out}: the last shard, which takes what is new, is more than twice as large as the others; --force cuts equal ones")
    return 0


def _join(args: argparse.Namespace) -> int:
    from dqe_engine.index.shard_files import join_indexes

    joined = join_indexes(args.out, args.names or None)
    print(f"{args.out}: {joined.items} items in {joined.describe()}")
    return 0


def _of_shard(parser: argparse.ArgumentParser) -> None:
    _of_index(parser)
    parser.add_argument("out", type=Path, help="folder of the shards, made or brought up to date")
    parser.add_argument("--shards", type=positive, metavar="N", help="number of shards (default: as many as exist)")
    parser.add_argument(
        "--force", action="store_true", help="cut equal shards anew, even if shards exist; readers follow at their next refresh"
    )


def _of_join(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path, help="folder that holds the indexes")
    parser.add_argument(
        "names",
        nargs="*",
        metavar="INDEX",
        help="names of the indexes in it, in order (default: all, as they were joined before, then new ones by name)",
    )


def _of_index(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("index", type=Path, help="folder of the index")


def _of_publish(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("new", type=Path, help="the index to publish; it stays as it is")
    parser.add_argument("served", type=Path, help="the served index, which is replaced; made if it is missing")
    parser.add_argument("--other-model", action="store_true", help="allow to replace an index that was made with another model")


def _of_list(parser: argparse.ArgumentParser) -> None:
    _of_index(parser)
    parser.add_argument("--filter", type=json_object, metavar="JSON", help="condition on metadata, as dqe-search takes it")


def _of_metadata(parser: argparse.ArgumentParser) -> None:
    _of_index(parser)
    parser.add_argument("file", type=Path, help=METADATA_RULES)
    parser.add_argument("--ignore-unknown", action="store_true", help="ignore ids that the index does not have")
    parser.add_argument("--dry-run", action="store_true", help="print what would be done, and write nothing")


def _of_sweep(parser: argparse.ArgumentParser) -> None:
    _of_index(parser)
    parser.add_argument("--uploads", type=Path, metavar="FOLDER", help="folder of uploads, as given to dqe-serve (default: INDEX.uploads)")
    parser.add_argument("--yes", action="store_true", help="remove the images; without --yes they are only counted")


class Tool(NamedTuple):
    description: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


TOOLS = {
    "stats": Tool("Sizes, model and precisions of an index, as JSON.", _of_index, _stats),
    "verify": Tool("Read all files of an index and compare them with their checksums.", _of_index, _verify),
    "compact": Tool("Drop the rows of removed and replaced items. Readers may go on meanwhile.", _of_index, _compact),
    "publish": Tool(
        "Put a verified index in the place of the one that is served, in one step; processes that serve it follow at their next refresh.",
        _of_publish,
        _publish,
    ),
    "list": Tool("Ids and metadata of the items, as JSON lines that `dqe-index metadata` reads.", _of_list, _list),
    "shard": Tool("Cut an index into shards that serve as one; run it again when the index has changed.", _of_shard, _shard),
    "join": Tool("Make indexes in one folder the shards of one, in order; run it again when one has changed.", _of_join, _join),
    "sweep": Tool("Remove uploaded images that no item was made from; writes that failed left them.", _of_sweep, _sweep),
    "tune": Tool(tune.DESCRIPTION, tune.add_arguments, tune.tune),
    "metadata": Tool("Give items other metadata; no images are needed.", _of_metadata, _metadata),
}
