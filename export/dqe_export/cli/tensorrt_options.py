"""The TensorRT part of `dqe-export`: its options, and what it does after the export or on an existing bundle."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from .export_choices import choices, resolve_target

if TYPE_CHECKING:
    from dqe_engine.contracts.graphs import GraphSizes, GraphSpec

    from ..tensorrt.plan import BuildOptions

_GIB = 2**30
_OPTIONS = (
    "dry_run", "trt_profile", "traffic", "workspace", "timing_cache", "optimization_level", "hardware_compatible", "version_compatible",
    "tf32",
)  # fmt: skip
"""Options that need --trt."""


def add_tensorrt_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("TensorRT", "engines for the GPU of this machine, in BUNDLE/tensorrt/ (docs/tensorrt.md)")
    group.add_argument("--trt", action="store_true", help="also build TensorRT engines, and check them against ONNX Runtime")
    group.add_argument(
        "--dry-run", action="store_true", help="print the plan and a trtexec line per graph, or why it cannot be built; needs no GPU"
    )
    group.add_argument(
        "--trt-profile",
        action="append",
        metavar="batch=MIN:OPT:MAX,text_length=MIN:OPT:MAX",
        help="sizes of a profile; repeat it for further profiles (default: batch=1:1:1 and batch=2:8:32, with texts of every length)",
    )
    group.add_argument("--traffic", type=Path, metavar="FILE", help='sizes from traffic: JSON lines {"batch": 4, "text_length": 11}')
    group.add_argument(
        "--workspace", type=_gibibytes, metavar="GB", help="most memory that a layer may use while it runs, GiB (default: no limit)"
    )
    group.add_argument("--timing-cache", type=Path, metavar="FILE", help="also read and write the timings of kernels in this file")
    group.add_argument("--optimization-level", type=int, choices=range(6), metavar="0-5", help="time spent on tuning (default: 3)")
    group.add_argument(
        "--hardware-compatible", action="store_true", help="build engines for every GPU since Ampere; slower than for one GPU"
    )
    group.add_argument(
        "--version-compatible", action="store_true", help="build engines that newer TensorRT versions run, too; slower than for one version"
    )
    group.add_argument("--tf32", action="store_true", help="let float32 products round to TF32: faster, and may miss the tolerance")


def check_combination(args: argparse.Namespace) -> None:
    """Raises InputError for arguments that do not go together."""
    from dqe_engine.errors import InputError

    if args.bundle is None and (args.checkpoint is None or args.out is None):
        raise InputError(
            "expected a checkpoint and a bundle to write, or --trt --bundle BUNDLE or --push OWNER/NAME --bundle BUNDLE for one that exists"
        )
    if args.bundle is not None and args.checkpoint is not None:
        raise InputError(f"--bundle {args.bundle} exports nothing, so it takes no checkpoint; leave one of them out")
    if args.traffic is not None and args.trt_profile:
        raise InputError("--traffic and --trt-profile both say which sizes to build for; choose one")
    names = _OPTIONS if args.push is not None else ("bundle", *_OPTIONS)
    given = [name for name in names if getattr(args, name) not in (None, False)]
    if given and not args.trt:
        raise InputError(f"--{given[0].replace('_', '-')} goes with --trt")
    if args.bundle is not None and args.precision is not None:
        raise InputError(f"--precision is that of {args.bundle}, whose graphs are built; leave it out, or export again")
    resolve_target(args)


def build_options(args: argparse.Namespace, max_text_length: int) -> BuildOptions:
    """Raises InputError, and ExportError for a timing cache that cannot be read."""
    from ..tensorrt.engines import named_cache
    from ..tensorrt.plan import BuildOptions, default_profiles, parse_profile, traffic_profile

    profiles = [parse_profile(text, max_text_length) for text in args.trt_profile or ()]
    if args.traffic is not None:
        profiles = [traffic_profile(args.traffic, max_text_length)]
    if args.timing_cache is not None:
        named_cache(args.timing_cache)
    return BuildOptions(
        profiles=tuple(profiles) or default_profiles(max_text_length),
        workspace=args.workspace,
        timing_cache=None if args.timing_cache is None else str(args.timing_cache),
        optimization_level=3 if args.optimization_level is None else args.optimization_level,
        hardware_compatible=args.hardware_compatible,
        version_compatible=args.version_compatible,
        tf32=args.tf32,
    )


def _note_left_out(options: BuildOptions, max_text_length: int) -> None:
    """Say on stderr which requests the engines will refuse."""
    from ..tensorrt.plan import lengths_left_out

    if lengths := lengths_left_out(options.profiles, max_text_length):
        which = f"some text of {lengths[0]} to {lengths[-1]} tokens"
        print(f"note: one query with {which} fits no profile and will be refused; add a --trt-profile from batch=1 on", file=sys.stderr)


def build_for_bundle(args: argparse.Namespace, path: Path) -> int:
    """Build engines for the bundle at `path`, or print what would be built. Raises InputError and BackendError where they cannot be
    built, ParityError where an engine fails its check."""
    from rich.console import Console

    from dqe_engine.bundle import Bundle
    from dqe_engine.tensorrt.cuda import Cuda

    from ..tensorrt.engines import build_engines
    from ..tensorrt.limits import check_bundle, check_gpu, operators

    bundle = Bundle.load(path)
    bundle.require_own()
    options = build_options(args, bundle.manifest.tokenizer.max_length)
    check_bundle(bundle)
    if args.bundle is not None:  # else it was said before the export
        _note_left_out(options, bundle.manifest.tokenizer.max_length)
    if args.dry_run:

        def known(spec: GraphSpec) -> str:
            found = operators(path / spec.file)
            return f"{bundle.manifest.precision}, {found.total()} nodes of {len(found)} operators, none of which TensorRT is known to lack"

        return print_plan(
            args, options, bundle.sizes, precision=f"{bundle.manifest.precision}, as in the ONNX graphs", bundle=path, known=known
        )
    check_gpu(Cuda().gpu(), options)
    if bundle.manifest.target != "cuda":
        print(f"note: {path} has graphs for CPUs; export with --trt or --target cuda for attention in the form that TensorRT documents as "
              "fused", file=sys.stderr)  # fmt: skip
    with Console(stderr=True).status("building") as status:
        folder, manifest = build_engines(bundle, options, force=args.force, advance=status.update)
    for engine in manifest.engines:
        outputs = engine.parity.outputs.values()
        worst, cosine = max(output.max_error for output in outputs), min(output.cosine_min for output in outputs)
        print(f"{engine.graph:16} from ONNX Runtime: max error {worst:.1e}, min cosine {cosine:.6f}; "
              f"{engine.layers} layers, {engine.build_seconds:.0f} s")  # fmt: skip
    print(f"{folder}  {sum(engine.file.size for engine in manifest.engines) / 1e6:.1f} MB")
    return 0


def print_plan(
    args: argparse.Namespace,
    options: BuildOptions,
    sizes: GraphSizes,
    *,
    precision: str,
    bundle: Path,
    known: Callable[[GraphSpec], str],
) -> int:
    """The plan on stdout, what stands in its way here on stderr. The folder's name is completed by the machine that builds.

    Raises BackendError for a GPU that the options leave out.
    """
    from dqe_engine.contracts.engines import ENGINES_FOLDER
    from dqe_engine.contracts.graphs import graphs_of
    from dqe_engine.errors import BackendError
    from dqe_engine.tensorrt.api import import_tensorrt
    from dqe_engine.tensorrt.cuda import Cuda

    from ..tensorrt.engines import engine_file, target_folder
    from ..tensorrt.limits import check_gpu
    from ..tensorrt.plan import describe_plan

    folder, note, gpu = f"{ENGINES_FOLDER}/GPU-VERSION", "", None
    try:
        gpu = Cuda().gpu()
        folder = target_folder(gpu, import_tensorrt().__version__, options)
    except BackendError as error:
        note = f"nothing can be built here: {error}"
    if gpu is not None:
        check_gpu(gpu, options)
    if not args.force and (taken := next((path for path in (args.out, bundle / folder) if path is not None and path.exists()), None)):
        note = note or f"{taken} exists already; --force replaces it"
    graphs = graphs_of(sizes)
    for line in describe_plan(graphs, sizes, options, precision=precision, bundle=bundle, folder=folder, file=engine_file, known=known):
        print(line)
    if note:
        print(f"note: {note}", file=sys.stderr)
    return 0


def _check_export(args: argparse.Namespace) -> str:
    """The precision, with its reason. Raises InputError for one that cannot be exported or built, before minutes of export."""
    from ..bundle import ExportOptions
    from ..calibration import EvaluationData
    from ..tensorrt.limits import check_precision

    data = EvaluationData.open(args.data) if args.data is not None else None
    ((precision, why),) = choices(args.precision, resolve_target(args), data, trt=True)
    check_precision(precision)
    ExportOptions(precision=precision, data=data)
    return why or precision


def plan_for_checkpoint(args: argparse.Namespace) -> int:
    """`--dry-run` before there is a bundle: the checkpoint knows the sizes."""
    from dqe_training.checkpointing.checkpoint import load_checkpoint

    why = _check_export(args)
    checkpoint, precision = load_checkpoint(args.checkpoint), why.partition(",")[0]
    options = build_options(args, checkpoint.meta.tokenizer.max_length)
    _note_left_out(options, checkpoint.meta.tokenizer.max_length)
    return print_plan(
        args, options, checkpoint.model.sizes, precision=why, bundle=args.out,
        known=lambda spec: f"{precision}, its operators are known after the export",
    )  # fmt: skip


def run_export(args: argparse.Namespace, export: Callable[[argparse.Namespace], int]) -> int:
    """`export`, and what the TensorRT options ask for before, after or instead of it."""
    check_combination(args)
    if args.bundle is not None:
        return build_for_bundle(args, args.bundle) if args.trt else 0
    if args.dry_run:
        return plan_for_checkpoint(args)
    if args.trt:
        _check_before_export(args)
    code = export(args)
    return build_for_bundle(args, args.out) if code == 0 and args.trt else code


def _check_before_export(args: argparse.Namespace) -> None:
    """A missing GPU or a mistaken option is told now, rather than after an export of minutes."""
    from dqe_engine.tensorrt.api import import_tensorrt
    from dqe_engine.tensorrt.cuda import Cuda
    from dqe_training.checkpointing.checkpoint import read_meta

    from ..tensorrt.limits import check_gpu

    _check_export(args)
    gpu = Cuda().gpu()
    import_tensorrt()
    longest = read_meta(args.checkpoint).tokenizer.max_length
    options = build_options(args, longest)
    check_gpu(gpu, options)
    _note_left_out(options, longest)


def _gibibytes(text: str) -> int:
    """argparse type: GiB, such as 4 or 0.5, in bytes."""
    try:
        size = int(float(text) * _GIB)
    except (ValueError, OverflowError):
        size = 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"expected GiB, such as 4 or 0.5, got {text!r}")
    return size
