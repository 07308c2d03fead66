"""The TensorRT part of `dqe-export`: its options, and what it does after the export or on an existing bundle."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dqe_engine.contracts.graphs import GraphSizes

    from ..tensorrt.plan import BuildOptions

_GIB = 2**30


def add_tensorrt_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("TensorRT", "engines for the GPU of this machine, in BUNDLE/tensorrt/ (docs/tensorrt.md)")
    group.add_argument("--trt", action="store_true", help="also build TensorRT engines, and check them against ONNX Runtime")
    group.add_argument("--dry-run", action="store_true", help="print the plan and a trtexec line per graph, and do nothing")
    group.add_argument(
        "--trt-profile",
        action="append",
        metavar="batch=MIN:OPT:MAX,text_length=MIN:OPT:MAX",
        help="sizes to build for; again for a further profile (default: batch=1:8:32, and every length of text)",
    )
    group.add_argument("--traffic", type=Path, metavar="FILE", help='sizes from traffic: JSON lines {"batch": 4, "text_length": 11}')
    group.add_argument("--workspace", type=_gibibytes, metavar="GB", help="memory that a layer may work in, GiB (default: no limit)")
    group.add_argument("--timing-cache", type=Path, metavar="FILE", help="read and write measured kernels here too")
    group.add_argument("--optimization-level", type=int, choices=range(6), metavar="0-5", help="time spent on tuning (default: 3)")
    group.add_argument("--hardware-compatible", action="store_true", help="engines for every GPU since Ampere, slower than for one")
    group.add_argument("--version-compatible", action="store_true", help="engines that newer TensorRT versions run, slower than for one")
    group.add_argument("--tf32", action="store_true", help="let float32 products round to TF32: faster, and may miss the tolerance")


def check_combination(args: argparse.Namespace) -> None:
    """Raises InputError for arguments that do not go together."""
    from dqe_engine.errors import InputError

    if args.bundle is None and (args.checkpoint is None or args.out is None):
        raise InputError("expected a checkpoint and a bundle to write, or --trt --bundle BUNDLE for one that exists")
    if args.bundle is not None and args.checkpoint is not None:
        raise InputError(f"--bundle {args.bundle} exports nothing, so it takes no checkpoint; leave one of them out")
    if args.traffic is not None and args.trt_profile:
        raise InputError("--traffic and --trt-profile both say which sizes to build for; choose one")
    names = ("bundle", "dry_run", "trt_profile", "traffic", "workspace", "timing_cache", "optimization_level",
             "hardware_compatible", "version_compatible", "tf32")  # fmt: skip
    given = [name for name in names if getattr(args, name) not in (None, False)]
    if given and not args.trt:
        raise InputError(f"--{given[0].replace('_', '-')} goes with --trt")


def build_options(args: argparse.Namespace, max_text_length: int) -> BuildOptions:
    """Raises InputError."""
    from ..tensorrt.plan import BuildOptions, default_profile, parse_profile, traffic_profile

    profiles = [parse_profile(text, max_text_length) for text in args.trt_profile or ()]
    if args.traffic is not None:
        profiles = [traffic_profile(args.traffic, max_text_length)]
    return BuildOptions(
        profiles=tuple(profiles) or (default_profile(max_text_length),),
        workspace=args.workspace,
        timing_cache=None if args.timing_cache is None else str(args.timing_cache),
        optimization_level=3 if args.optimization_level is None else args.optimization_level,
        hardware_compatible=args.hardware_compatible,
        version_compatible=args.version_compatible,
        tf32=args.tf32,
    )


def build_for_bundle(args: argparse.Namespace, path: Path) -> int:
    """Build engines for the bundle at `path`, or print what would be built. Raises ParityError where an engine fails its check."""
    from rich.console import Console

    from dqe_engine.bundle import Bundle

    from ..tensorrt.engines import build_engines

    bundle = Bundle.load(path)
    options = build_options(args, bundle.manifest.tokenizer.max_length)
    if args.dry_run:
        return print_plan(options, bundle.sizes, precision=bundle.manifest.precision, bundle=path)
    with Console(stderr=True).status("building") as status:
        folder, manifest = build_engines(bundle, options, force=args.force, advance=status.update)
    for engine in manifest.engines:
        outputs = engine.parity.outputs.values()
        worst, cosine = max(output.max_error for output in outputs), min(output.cosine_min for output in outputs)
        print(f"{engine.graph:16} from ONNX Runtime: max error {worst:.1e}, min cosine {cosine:.6f}; "
              f"{engine.layers} layers, {engine.build_seconds:.0f} s")  # fmt: skip
    print(f"{folder}  {sum(engine.file.size for engine in manifest.engines) / 1e6:.1f} MB")
    return 0


def print_plan(options: BuildOptions, sizes: GraphSizes, *, precision: str, bundle: Path) -> int:
    """The plan on stdout; the folder's name is completed by the machine that builds."""
    from dqe_engine.contracts.engines import ENGINES_FOLDER
    from dqe_engine.contracts.graphs import GRAPHS
    from dqe_engine.errors import BackendError
    from dqe_engine.tensorrt.api import import_tensorrt
    from dqe_engine.tensorrt.cuda import Cuda

    from ..tensorrt.engines import engine_file, target_folder
    from ..tensorrt.plan import describe_plan

    try:
        folder = target_folder(Cuda().gpu(), import_tensorrt().__version__, options)
        missing = ""
    except BackendError as error:
        folder, missing = f"{ENGINES_FOLDER}/GPU-VERSION", str(error)
    for line in describe_plan(GRAPHS, sizes, options, precision=precision, bundle=bundle, folder=folder, file=engine_file):
        print(line)
    if missing:
        print(f"note: nothing can be built here: {missing}", file=sys.stderr)
    return 0


def plan_for_checkpoint(args: argparse.Namespace) -> int:
    """`--dry-run` before there is a bundle: the checkpoint knows the sizes."""
    from dqe_training.checkpoint import load_checkpoint

    from .export import PRECISIONS

    checkpoint = load_checkpoint(args.checkpoint)
    options = build_options(args, checkpoint.meta.tokenizer.max_length)
    return print_plan(options, checkpoint.model.sizes, precision=PRECISIONS.get(args.precision or "f32", args.precision), bundle=args.out)


def run_export(args: argparse.Namespace, export: Callable[[argparse.Namespace], int]) -> int:
    """`export`, and what the TensorRT options ask for before, after or instead of it."""
    check_combination(args)
    if args.bundle is not None:
        return build_for_bundle(args, args.bundle)
    if args.dry_run:
        return plan_for_checkpoint(args)
    if args.trt:
        _check_before_export(args)
    code = export(args)
    return build_for_bundle(args, args.out) if code == 0 and args.trt else code


def _check_before_export(args: argparse.Namespace) -> None:
    """A missing GPU or a mistaken option is told now, rather than after an export of minutes."""
    from dqe_engine.errors import InputError
    from dqe_engine.tensorrt.api import import_tensorrt
    from dqe_engine.tensorrt.cuda import Cuda
    from dqe_training.checkpoint import read_meta

    if args.precision == "int8":
        raise InputError(
            "--precision int8 quantises while it runs, which TensorRT has no operators for; use --trt with f32, f16 or int8-static"
        )
    Cuda()
    import_tensorrt()
    build_options(args, read_meta(args.checkpoint).tokenizer.max_length)


def _gibibytes(text: str) -> int:
    """argparse type: GiB, such as 4 or 0.5, in bytes."""
    try:
        size = int(float(text) * _GIB)
    except (ValueError, OverflowError):
        size = 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"expected GiB, such as 4 or 0.5, got {text!r}")
    return size
