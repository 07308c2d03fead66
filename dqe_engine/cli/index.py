"""`dqe-index`: a folder of images into a gallery index; interrupted or killed, it goes on where it stopped."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from .main import EXIT_INTERRUPTED, add_runtime_options, positive, run

if TYPE_CHECKING:
    from dqe_engine.engine import RetrievalEngine
    from dqe_engine.preprocessing import ImageLike
    from dqe_engine.results import SkippedImage

SHOWN_SKIPPED = 20


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dqe-index",
        description="Index a folder of images. Run again, it adds what is new; an item's id is its path relative to the folder.",
    )
    parser.add_argument("bundle", type=Path, help="the exported model")
    parser.add_argument(
        "images", type=Path, help="folder, walked recursively for JPEG, PNG, WebP, GIF, BMP, TIFF and AVIF, whatever their names"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="INDEX", help="folder of the index, made or continued")
    parser.add_argument("--batch-size", type=positive, default=32, metavar="N", help="images per pass (default: 32)")
    parser.add_argument("--save-every", type=positive, default=512, metavar="N", help="images between two saves (default: 512)")
    parser.add_argument("--storage", choices=("f32", "f16"), help="precision of the target tokens of a new index (default: f32)")
    parser.add_argument(
        "--image-tokens",
        choices=("f16", "f32", "none"),
        help="keep image tokens, so that catalogue references need no vision pass (default for a new index: f16)",
    )
    parser.add_argument("--skip-bad", action="store_true", help="go on after images that cannot be read, and list them at the end")
    parser.add_argument(
        "--ray",
        action="store_true",
        help="encode on a Ray cluster: that of RAY_ADDRESS, else one on this machine (docs/training-at-scale.md)",
    )
    parser.add_argument("--ray-workers", type=positive, metavar="N", help="processes that encode, with --ray (default: 2)")
    parser.add_argument("--prune", action="store_true", help="remove items whose image is gone from the folder")
    parser.add_argument("--force", action="store_true", help="start anew; the index that is there is replaced when the new one is complete")
    add_runtime_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run(lambda: _index(build_parser().parse_args(argv)))


def _index(args: argparse.Namespace) -> int:
    from dqe_engine.engine import RetrievalEngine
    from dqe_engine.errors import InputError
    from dqe_engine.image_sources import find_images

    if args.ray_workers is not None and not args.ray:
        raise InputError(f"--ray-workers {args.ray_workers} goes with --ray")
    found = find_images(args.images)
    pairs, passed_over = found.pairs, found.describe_passed_over()
    if not pairs:
        raise InputError(f"{args.images}: no images in this folder ({passed_over or 'it is empty'})")
    if passed_over:
        print(f"{args.images}: {passed_over}")
    engine = RetrievalEngine.load(args.bundle, provider=args.provider, threads=args.threads)
    skipped: list[SkippedImage] = []
    fill = _replace_index if args.force and (args.out / "manifest.json").exists() else _continue_index
    try:
        added = fill(engine, pairs, args, skipped)
    finally:
        for image in skipped[:SHOWN_SKIPPED]:
            print(f"skipped: {image.reason}", file=sys.stderr)
        if len(skipped) > SHOWN_SKIPPED:
            print(f"skipped: {len(skipped) - SHOWN_SKIPPED} more", file=sys.stderr)
    if added is None:
        return EXIT_INTERRUPTED
    print(f"{args.out}: {added} images added, {len(skipped)} skipped, {len(engine.index)} in the index")
    return 0


def _continue_index(
    engine: RetrievalEngine, pairs: Sequence[tuple[str, ImageLike]], args: argparse.Namespace, skipped: list[SkippedImage]
) -> int | None:
    """Add what is new to the index in `--out`, saving as it goes. How many images were added, None after Ctrl-C."""
    from dqe_engine.errors import IndexConflictError

    try:
        return _add_new(engine, pairs, args, skipped)
    except IndexConflictError as error:  # whose remedies are those of a program
        message = "another process wrote to this index meanwhile; when it is done, run the same command again to go on"
        raise IndexConflictError(f"{args.out}: {message}") from error


def _add_new(
    engine: RetrievalEngine, pairs: Sequence[tuple[str, ImageLike]], args: argparse.Namespace, skipped: list[SkippedImage]
) -> int | None:
    _open_index(engine, args)
    if args.prune:
        engine.index.remove(set(engine.index.ids) - {id for id, _ in pairs})
    engine.save_index(args.out)  # before the work: a folder that cannot be written is an error now
    present = len(engine.index)
    try:
        _add_all(engine, [(id, image) for id, image in pairs if id not in engine.index], args, skipped, args.out)
    except KeyboardInterrupt:
        kept = f"finished shards stay in {_shards(args)}" if args.ray else f"{len(engine.index)} images are saved in {args.out}"
        print(f"interrupted: {kept}; run the same command to go on", file=sys.stderr)
        return None
    return len(engine.index) - present


def _replace_index(
    engine: RetrievalEngine, pairs: Sequence[tuple[str, ImageLike]], args: argparse.Namespace, skipped: list[SkippedImage]
) -> int | None:
    """Build anew beside `--out` and put that in the old index's place when it is complete; until then the old one stays."""
    from dqe_engine.errors import InputError
    from dqe_engine.files import scratch_directory
    from dqe_engine.index.storage import writing

    with writing(args.out):  # before the work, as above
        pass
    with scratch_directory(args.out) as place:
        _new_index(engine, args)
        try:
            _add_all(engine, pairs, args, skipped, place)
        except KeyboardInterrupt:
            print(f"interrupted: {args.out} is as it was; run the same command to start again", file=sys.stderr)
            return None
        if not len(engine.index):
            raise InputError(f"{args.images}: none of the images can be read; {args.out} is as it was")
        engine.save_index(args.out, overwrite=True)
    return len(engine.index)


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


def _add_all(
    engine: RetrievalEngine, todo: Sequence[tuple[str, ImageLike]], args: argparse.Namespace, skipped: list[SkippedImage], place: Path
) -> None:
    """Encode and add images, saving to `place` every `--save-every`. Raises KeyboardInterrupt between two batches."""
    if args.ray:
        _add_all_on_ray(engine, todo, args, skipped, place)
        return
    with _interrupts_between_batches() as check_stopped, _progress_bar(len(todo)) as advance_to:
        for start in range(0, len(todo), args.save_every):

            def progress(done: int, _: int, start: int = start) -> None:
                advance_to(start + done)
                check_stopped()

            try:
                report = engine.index_images(
                    dict(todo[start : start + args.save_every]),
                    batch_size=args.batch_size,
                    progress=progress,
                    on_error="skip" if args.skip_bad else "raise",
                )
                skipped += report.skipped
            finally:  # what was added before a bad image or Ctrl-C is kept too
                engine.save_index(place)


def _shards(args: argparse.Namespace) -> Path:
    out: Path = args.out.absolute()
    return out.with_name(f"{out.name}.shards")


def _add_all_on_ray(
    engine: RetrievalEngine, todo: Sequence[tuple[str, ImageLike]], args: argparse.Namespace, skipped: list[SkippedImage], place: Path
) -> None:
    """The same, by a Ray cluster: shards of `--save-every` images in a folder beside `--out`, then merged. Interrupted, the
    finished shards stay there and nothing is added."""
    from dqe_engine.engine import usable_pairs
    from dqe_engine.index.on_ray import ShardJob, encode_shards, merge_shards
    from dqe_engine.index.validation import check_ids

    pairs = usable_pairs(todo, skipped) if args.skip_bad else list(todo)
    check_ids([id for id, _ in pairs])
    files = [(id, str(Path(str(image)).absolute())) for id, image in pairs]
    jobs = [
        ShardJob(
            pairs=tuple(files[start : start + args.save_every]), storage=engine.index.storage, image_storage=engine.index.image_storage,
            batch_size=args.batch_size, skip_bad=args.skip_bad,
        )
        for start in range(0, len(files), args.save_every)
    ]  # fmt: skip
    shards = _shards(args)
    done = 0
    with _progress_bar(len(files)) as advance_to:

        def advance(images: int) -> None:
            nonlocal done
            done += images
            advance_to(done)

        encode_shards(args.bundle, jobs, shards, workers=args.ray_workers or 2, provider=args.provider, threads=args.threads, done=advance)
    skipped += merge_shards(engine.index, jobs, shards, place)


@contextmanager
def _progress_bar(total: int) -> Iterator[Callable[[int], None]]:
    """A function that moves the bar on stderr to a number of images done; no bar where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("indexing"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("indexing", total=total)
        yield lambda done: bar.update(task, completed=done)


@contextmanager
def _interrupts_between_batches() -> Iterator[Callable[[], None]]:
    """Hold back the first Ctrl-C until the yielded function is called, which then raises KeyboardInterrupt.

    A second Ctrl-C stops at once. Only the main thread receives signals; elsewhere nothing is held back, nor where SIGINT was
    ignored from the start, as in a shell's background job: a signal that the caller had us ignore stays ignored.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is signal.SIG_IGN:
        yield lambda: None
        return
    asked = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        asked.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print("stopping after this batch; Ctrl-C again stops at once", file=sys.stderr)

    def check() -> None:
        if asked.is_set():
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, ask)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)
