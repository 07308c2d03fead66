"""What is to be built: options, profiles from options or from traffic, and the same said as a `trtexec` line. Plain data."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from dqe_engine.contracts.engines import AxisRange, Profile
from dqe_engine.contracts.graphs import DYNAMIC_AXES, GraphSizes, GraphSpec
from dqe_engine.contracts.parsing import Contract, parse, parse_json, without_mark
from dqe_engine.errors import InputError
from dqe_engine.files import describe_os_error, read_regular
from dqe_engine.tensorrt.sizes import SHORTEST_TEXT, any_request, any_text

ONE_QUERY = AxisRange(min=1, opt=1, max=1)
BATCHES = AxisRange(min=2, opt=8, max=32)
_TRAFFIC_MAX = 0.99  # quantile of batches; larger ones run in parts, so that one outlier does not size every buffer


class BuildOptions(Contract, frozen=True):
    """`workspace`: bytes, None for TensorRT's own limit. `timing_cache`: a file that is read, and written after the build.

    `tf32` lets float32 products round to 10 bits of mantissa, as TensorRT does unless told otherwise; off, float32 is float32.
    """

    profiles: tuple[Profile, ...]
    workspace: int | None = None
    timing_cache: str | None = None
    optimization_level: int = 3
    hardware_compatible: bool = False
    version_compatible: bool = False
    tf32: bool = False

    def __post_init__(self) -> None:
        if not self.profiles:
            raise ValueError("expected at least one profile, got none")
        if not 0 <= self.optimization_level <= 5:
            raise ValueError(f"optimization_level is 0 to 5, got {self.optimization_level}")


class _Request(Contract, frozen=True):
    """One line of a traffic file."""

    batch: int
    text_length: int

    def __post_init__(self) -> None:
        if self.batch < 1 or self.text_length < SHORTEST_TEXT:
            raise ValueError(f"expected batch >= 1 and text_length >= {SHORTEST_TEXT}, got {self.batch} and {self.text_length}")


def default_profiles(max_text_length: int) -> tuple[Profile, ...]:
    """One query, which has an engine tuned for it and a CUDA graph, and batches of 2 to 32; any text that the tokenizer gives."""
    text_length = any_text(max_text_length)
    return Profile(batch=ONE_QUERY, text_length=text_length), Profile(batch=BATCHES, text_length=text_length)


def distinct_profiles(spec: GraphSpec, profiles: Sequence[Profile]) -> tuple[Profile, ...]:
    """Those of `profiles` that differ in the axes that `spec` has, in their order: profiles of one batch that differ in their texts
    are one for the vision tower, which must not be built twice for it."""
    axes = {str(axis) for tensor in spec.inputs for axis in tensor.axes if axis in DYNAMIC_AXES}
    found: dict[tuple[AxisRange, ...], Profile] = {}
    for profile in profiles:
        found.setdefault(tuple(getattr(profile, axis) for axis in sorted(axes)), profile)
    return tuple(found.values())


def lengths_left_out(profiles: Sequence[Profile], max_text_length: int) -> list[int]:
    """Lengths of text at which one query fits none of `profiles`: the engines will refuse such requests."""
    single = [profile.text_length for profile in profiles if profile.batch.min == 1]
    return [n for n in range(SHORTEST_TEXT, max_text_length + 1) if not any(texts.min <= n <= texts.max for texts in single)]


def parse_profile(text: str, max_text_length: int) -> Profile:
    """ "batch=1:8:32,text_length=2:16:64", an axis left out as in `any_request`: it may be the only profile. Raises InputError."""
    where = f"--trt-profile {text!r}"
    ranges: dict[str, dict[str, int]] = {}
    for part in text.split(","):
        axis, _, values = part.strip().partition("=")
        if axis not in DYNAMIC_AXES or axis in ranges:
            raise InputError(f"{where}: expected batch=MIN:OPT:MAX and text_length=MIN:OPT:MAX, each once, with a comma between them")
        numbers = values.split(":")
        if len(numbers) != 3 or not all(number.isascii() and number.isdigit() for number in numbers):
            raise InputError(f"{where}: {axis} takes three whole numbers MIN:OPT:MAX, got {values!r}")
        ranges[axis] = dict(zip(("min", "opt", "max"), map(int, numbers), strict=True))
    profile = parse(Profile, msgspec.to_builtins(any_request(max_text_length)) | ranges, where=where)
    if profile.text_length.min < SHORTEST_TEXT or profile.text_length.max > max_text_length:
        raise InputError(f"{where}: texts have {SHORTEST_TEXT} to {max_text_length} tokens in this bundle")
    return profile


def traffic_profile(path: Path, max_text_length: int) -> Profile:
    """A profile from JSON lines of {"batch": 4, "text_length": 11}, one per request; text_length counts all tokens.

    It is tuned for the medians. The largest batch is the 99 % quantile; the other limits are the graph's own, since what
    did not come up in one file of traffic must still be served. Raises InputError.
    """
    try:
        lines = without_mark(read_regular(path)).splitlines()
    except OSError as error:
        raise InputError(describe_os_error(error, path)) from error
    requests = [parse_json(_Request, line, where=f"{path}, line {n}") for n, line in enumerate(lines, start=1) if line.strip()]
    if not requests:
        raise InputError(f'{path}: no traffic in it; expected lines such as {{"batch": 4, "text_length": 11}}')
    batches = sorted(request.batch for request in requests)
    lengths = sorted(request.text_length for request in requests)
    if lengths[-1] > max_text_length:
        raise InputError(f"{path}: a text of {lengths[-1]} tokens, but this bundle cuts texts at {max_text_length}")
    return Profile(
        batch=AxisRange(min=1, opt=_quantile(batches, 0.5), max=_quantile(batches, _TRAFFIC_MAX)),
        text_length=AxisRange(min=SHORTEST_TEXT, opt=_quantile(lengths, 0.5), max=max_text_length),
    )


def _quantile(values: Sequence[int], share: float) -> int:
    """The least of the sorted `values` that `share` of them do not exceed."""
    return next(value for n, value in enumerate(values, start=1) if n >= share * len(values))


def input_shapes(spec: GraphSpec, sizes: GraphSizes, profile: Profile, which: str) -> dict[str, tuple[int, ...]]:
    """Shape of every input at "min", "opt" or "max"."""
    return {tensor.name: tensor.shape(sizes, **profile.sizes(which)) for tensor in spec.inputs}


def trtexec_line(spec: GraphSpec, sizes: GraphSizes, options: BuildOptions, *, onnx: Path, engine: Path) -> str:
    """The command that builds the same engine, for a shell. TensorRT 11 ignores --stronglyTyped, 10 needs it."""
    words = ["trtexec", f"--onnx={onnx}", f"--saveEngine={engine}", "--stronglyTyped", "--skipInference"]
    profiles = distinct_profiles(spec, options.profiles)
    for index, profile in enumerate(profiles):
        if len(profiles) > 1:
            words.append(f"--profile={index}")
        for which in ("min", "opt", "max"):
            shapes = input_shapes(spec, sizes, profile, which)
            words.append(f"--{which}Shapes=" + ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items()))
    words.append(f"--builderOptimizationLevel={options.optimization_level}")
    words.append("--profilingVerbosity=detailed")
    for wanted, word in (
        (options.workspace is not None, f"--memPoolSize=workspace:{options.workspace}B"),
        (options.timing_cache is not None, f"--timingCacheFile={options.timing_cache}"),
        (options.hardware_compatible, "--hardwareCompatibilityLevel=ampere+"),
        (options.version_compatible, "--versionCompatible"),
        (not options.tf32, "--noTF32"),
    ):
        if wanted:
            words.append(word)
    return shlex.join(words)


def describe_plan(
    graphs: Sequence[GraphSpec],
    sizes: GraphSizes,
    options: BuildOptions,
    *,
    precision: str,
    bundle: Path,
    folder: str,
    file: Callable[[GraphSpec], str],
    known: Callable[[GraphSpec], str],
) -> list[str]:
    """What `--dry-run` prints: a line per decision and per graph, then one `trtexec` line per graph.

    `precision`: with its reason. `known`: what else there is to say of a graph.
    """
    lines = [f"precision   {precision}{'; float32 products are rounded to TF32' if options.tf32 else ''}"]
    lines.append(f"engines     {bundle / folder}")
    for index, profile in enumerate(options.profiles):
        axes = ", ".join(f"{axis} {r.min}:{r.opt}:{r.max}" for axis, r in (("batch", profile.batch), ("text_length", profile.text_length)))
        lines.append(f"profile {index}   {axes} (min:opt:max)")
    for spec in graphs:
        indices = ", ".join(str(options.profiles.index(profile)) for profile in distinct_profiles(spec, options.profiles))
        lines.append(f"graph       {spec.name}: profiles {indices}; {known(spec)}")
    lines.append("checks      each engine against ONNX Runtime on the CPU at every min, opt and max, beside them, and at captured sizes")
    commands = (trtexec_line(spec, sizes, options, onnx=bundle / spec.file, engine=bundle / folder / file(spec)) for spec in graphs)
    return [*lines, *commands]
