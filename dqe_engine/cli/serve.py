"""`dqe-serve`: a search page and an HTTP service over a bundle and an index."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from .main import EXIT_INTERRUPTED, add_device_option, add_runtime_options, positive, run

if TYPE_CHECKING:
    from dqe_engine.server.settings import ServerSettings

MIB = 1 << 20


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dqe-serve",
        description="Serve a search page and an HTTP API over a bundle and an index; on this machine alone unless --host says more.",
        epilog="docs/serving.md has the API, docs/operations.md how to run it for others.",
    )
    parser.add_argument("bundle", type=Path, nargs="?", help="the exported model: a folder, or hf://OWNER/NAME@REVISION")
    parser.add_argument(
        "index",
        type=Path,
        nargs="?",
        help="folder of an index, sharded folder, or file that says where an index is (default: FOLDER.index, beside --images FOLDER)",
    )
    parser.add_argument("--sample", action="store_true", help="serve the model and the photos that come with this package")
    _add_photos(parser)
    _add_access(parser)
    _add_limits(parser)
    parser.add_argument(
        "--log",
        choices=("info", "warning", "error"),
        default="warning" if sys.stderr.isatty() else "info",
        help="least level of the JSON lines on stderr; info has a line for each request (default: info, on a terminal warning)",
    )
    add_device_option(parser)
    add_runtime_options(parser)
    return parser


def _add_photos(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("photos")
    group.add_argument(
        "--images",
        action="append",
        default=[],
        metavar="[PREFIX/=]FOLDER",
        help="folder of the photos that the page shows; an item's id is PREFIX/ and the path in FOLDER; may be repeated",
    )
    group.add_argument(
        "--update",
        action="store_true",
        help="bring the index up to date with --images, in the background (always done if INDEX is left out)",
    )
    group.add_argument("--readd", action="store_true", help="with --update: also index the photos of items that were removed by the API")
    group.add_argument(
        "--metadata", type=Path, metavar="FILE", help="metadata of the photos to index, by id: JSON lines or CSV, as dqe-index takes it"
    )
    group.add_argument("--uploads", type=Path, metavar="FOLDER", help="folder for the images of added items (default: INDEX.uploads)")


def _add_access(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("who reaches the server")
    group.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="address to listen on; 0.0.0.0 listens on all (default: 127.0.0.1, this machine alone)",
    )
    group.add_argument("--port", type=int, default=8000, metavar="N", help="port to listen on; 0 takes a free one (default: 8000)")
    group.add_argument(
        "--hostname",
        action="append",
        default=[],
        metavar="NAME",
        help="host name that clients may use; requests with another Host are refused; may be repeated",
    )
    group.add_argument(
        "--proxy",
        action="append",
        default=[],
        metavar="ADDRESS",
        help="address of a proxy whose X-Forwarded-For is believed; may be repeated",
    )
    group.add_argument(
        "--keys",
        type=Path,
        metavar="FILE",
        help="file of lines 'read KEY NAME' and 'write KEY NAME' (or set DQE_SERVE_KEYS); without keys, anybody reads and nobody writes",
    )


def _add_limits(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("work and its limits")
    group.add_argument("--workers", type=positive, default=1, metavar="N", help="processes that share the port and the index (default: 1)")
    group.add_argument("--batch", type=positive, default=32, metavar="N", help="most queries that are answered in one batch (default: 32)")
    group.add_argument(
        "--room",
        type=positive,
        default=256,
        metavar="N",
        help="most queries that wait in each worker; further ones get a 429 (default: 256)",
    )
    group.add_argument(
        "--deadline",
        type=_seconds,
        default=10.0,
        metavar="SECONDS",
        help="longest time until an answer; clients may ask for less (default: 10)",
    )
    group.add_argument(
        "--drain", type=_seconds, default=30.0, metavar="SECONDS", help="longest time for open requests to end after SIGTERM (default: 30)"
    )
    group.add_argument("--max-body", type=positive, default=12, metavar="MIB", help="largest body of a request (default: 12)")
    group.add_argument(
        "--rate", type=_seconds, metavar="N", help="most requests a second that each worker takes from one client (default: unlimited)"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run(lambda: _serve(build_parser().parse_args(argv)))


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"expected a number above 0 and below 1000000, got {text}")
    return value


def _serve(args: argparse.Namespace) -> int:
    from dqe_engine.errors import InputError
    from dqe_engine.index.elsewhere import is_elsewhere
    from dqe_engine.index.metadata_file import read_metadata
    from dqe_engine.index.on_devices import check_devices
    from dqe_engine.index.storage import MANIFEST_FILE
    from dqe_engine.server.background import FolderJob
    from dqe_engine.server.keys import read_keys
    from dqe_engine.server.run import serve
    from dqe_engine.server.settings import ServerSettings

    bundle, index, photos = _places(args)
    updating = bool(photos) and (args.update or args.index is None)
    if args.update and not photos:
        raise InputError("--update has no photos to index; add --images FOLDER, or leave it out")
    if args.readd and not updating:
        raise InputError("--readd has no effect without --update; add --update and --images FOLDER, or leave it out")
    metadata = args.metadata
    if args.sample:
        from dqe_engine import sample

        metadata = sample.metadata()
    elif metadata is not None:
        if not updating:
            raise InputError("--metadata has no effect without --update; add --update, or run dqe-index metadata INDEX FILE")
        read_metadata(metadata)  # what is wrong with it is told now
    if photos and not updating and not (index / MANIFEST_FILE).exists() and not is_elsewhere(index):
        raise InputError(f"{index}: no index here; add --update to make it of the photos in --images")
    _check(bundle, index, made_here=updating, workers=args.workers)
    check_devices(args.search_on)
    if args.search_on and is_elsewhere(index):
        raise InputError(f"--search-on: {index} is sharded or in Milvus; only a single index is copied to devices, so leave the option out")
    with _state() as state:
        settings = ServerSettings(
            bundle=bundle, index=index, photos=photos, uploads=args.uploads,
            keys=read_keys(args.keys, os.environ), provider=args.provider, threads=args.threads, most=args.batch, room=args.room,
            max_body_bytes=args.max_body * MIB, rate=args.rate, deadline_s=args.deadline, drain_s=args.drain,
            hosts=tuple(args.hostname), proxies=tuple(args.proxy), workers=args.workers, state=state, host=args.host, port=args.port,
            log=args.log, devices=args.search_on,
        )  # fmt: skip
        _warn_of_strangers(settings)

        def again() -> ServerSettings:
            _check(bundle, index, made_here=False, workers=args.workers)
            return replace(settings, keys=read_keys(args.keys, os.environ))

        indexing = None
        if updating:
            assert settings.progress_file is not None
            job = FolderJob(
                bundle=bundle, index=index, folders=photos, state_file=settings.progress_file, metadata=metadata,
                uploads=settings.uploads_folder, readd=args.readd, provider=args.provider, threads=args.threads,
            )  # fmt: skip
            indexing = job.command()
        try:
            return serve(settings, indexing=indexing, again=again)
        except KeyboardInterrupt:
            return EXIT_INTERRUPTED


def _warn_of_strangers(settings: ServerSettings) -> None:
    """What is open to others on purpose is no error, and is said. Words on stderr, before the lines of the log."""
    if not settings.on_loopback and not settings.keys:
        says = "whoever reaches this address may search and see all items and pictures; --keys FILE asks for a key"
        print(f"warning: --host {settings.host} without keys: {says}", file=sys.stderr, flush=True)


def _places(args: argparse.Namespace) -> tuple[Path, Path, tuple[tuple[str, Path], ...]]:
    """Bundle, index and folders of photos, absolute. Raises InputError, and what `bundle_folder` does."""
    from dqe_engine.bundle import bundle_folder
    from dqe_engine.errors import InputError

    photos = []
    for given in args.images:
        prefix, found, folder = given.partition("/=")
        prefix, folder = (prefix + "/", folder) if found else ("", given)
        if not Path(folder).is_dir():
            raise InputError(f"--images {given}: no folder there; check the path")
        photos.append((prefix, Path(folder).absolute()))
    bundle, index = args.bundle, args.index
    if args.sample:
        from dqe_engine import sample

        if bundle is not None or photos:
            raise InputError("--sample brings its own bundle and photos; leave BUNDLE and --images out")
        bundle, folder, index = sample.bundle(), sample.photos(), sample.index()
        photos = [("", folder)]
    if bundle is None:
        raise InputError("BUNDLE is missing; give the folder that dqe-export wrote, or --sample")
    if index is None:
        if not photos:
            raise InputError("INDEX is missing; give the folder that dqe-index wrote, or the photos themselves with --images FOLDER")
        first = photos[0][1]
        index = first.with_name(first.name + ".index")
    # One commit for all workers, until the next start.
    return bundle_folder(bundle).absolute(), index.absolute(), tuple(photos)


def _check(bundle: Path, index: Path, *, made_here: bool, workers: int) -> None:
    """Fail now, in one line, where every worker would; make the index that is to be filled. Raises InputError, BundleError and
    IndexFormatError."""
    from dqe_engine.bundle import Bundle
    from dqe_engine.errors import InputError
    from dqe_engine.index import GalleryIndex
    from dqe_engine.index.elsewhere import check_elsewhere, is_elsewhere
    from dqe_engine.server.writes import make_index

    loaded = Bundle.load(bundle)
    if is_elsewhere(index):
        if made_here:
            raise InputError(f"--update: {index} is only read here; change the index that it was made from (docs/scaling.md)")
        check_elsewhere(index, loaded.model_hash, workers=workers)
        return
    if made_here:
        make_index(loaded, index)
    GalleryIndex.load(index, model_hash=loaded.model_hash).close()


@contextlib.contextmanager
def _state() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="dqe-serve-") as folder:
        yield Path(folder)
