"""One ONNX graph to one engine: the only place that calls TensorRT's builder."""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dqe_engine.contracts.graphs import GraphSizes, GraphSpec
from dqe_engine.errors import ExportError
from dqe_engine.tensorrt.api import Logger, load_engine

from .plan import BuildOptions, distinct_profiles, input_shapes

_SHOWN_ERRORS = 3


@dataclass(frozen=True)
class BuiltEngine:
    """`timing_cache`: the cache with what this build measured, empty where the builder kept none."""

    plan: bytes
    seconds: float
    timing_cache: bytes


def build_engine(
    trt: Any, path: Path, spec: GraphSpec, sizes: GraphSizes, options: BuildOptions, *, timing_cache: bytes, needed: bool, logger: Logger
) -> BuiltEngine:
    """Parse `path` (external weights beside it) and build. `timing_cache`: of an earlier build, b"" for none; where it is refused, an error
    if it is `needed`, else the build starts without.

    Networks are strongly typed: TensorRT 11 knows no others, and 10 is asked for it, so the graph alone decides the precision.
    Raises ExportError, one line: operators that TensorRT lacks, a cache of another device or version, too little memory.
    """
    start = time.perf_counter()
    try:
        builder = trt.Builder(logger)
    except TypeError as error:  # what pybind11 makes of a null pointer
        raise ExportError(f"{spec.name}: TensorRT makes no builder: {logger.errors()}") from error
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        raise ExportError(_parse_failure(trt, parser, spec))
    config = _configure(trt, builder, spec, sizes, options)
    cache = _set_cache(config, timing_cache)  # must live until the build has ended
    if cache is None and needed:
        raise ExportError(
            f"{spec.name}: the timing cache was made on another GPU or by another TensorRT than {trt.__version__}; "
            "name another file with --timing-cache, or remove this one"
        )
    cache = cache or _set_cache(config, b"")
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise ExportError(_build_failure(spec, logger.errors()))
    measured = config.get_timing_cache()
    return BuiltEngine(
        plan=bytes(plan), seconds=time.perf_counter() - start, timing_cache=b"" if measured is None else bytes(measured.serialize())
    )


def inspect_layers(trt: Any, plan: bytes, logger: Logger, *, host_code: bool) -> dict[str, int]:
    """How many layers of each type the engine has, by the engine inspector; type "unknown" where it gives only names, or nothing that can
    be read: a finished engine is not thrown away for want of its description."""
    engine = load_engine(trt, plan, logger, host_code=host_code)
    try:
        inspector = engine.create_engine_inspector()
        layers = json.loads(inspector.get_engine_information(trt.LayerInformationFormat.JSON), strict=False)["Layers"]  # control characters
        types = Counter(str(layer.get("LayerType", "unknown")) if isinstance(layer, dict) else "unknown" for layer in layers)
    except (ValueError, TypeError, LookupError, AttributeError):  # no text, no JSON, or JSON of another form
        types = Counter(unknown=engine.num_layers)
    return dict(sorted(types.items()))


def _set_cache(config: Any, timing_cache: bytes) -> Any | None:
    """The cache, now set; None where the builder refuses it."""
    cache = config.create_timing_cache(timing_cache)
    return cache if cache is not None and config.set_timing_cache(cache, False) else None


def _configure(trt: Any, builder: Any, spec: GraphSpec, sizes: GraphSizes, options: BuildOptions) -> Any:
    config = builder.create_builder_config()
    for values in distinct_profiles(spec, options.profiles):
        profile = builder.create_optimization_profile()
        shapes = [input_shapes(spec, sizes, values, which) for which in ("min", "opt", "max")]
        for tensor in spec.inputs:
            profile.set_shape(tensor.name, *(shape[tensor.name] for shape in shapes))
        if config.add_optimization_profile(profile) < 0:
            raise ExportError(f"{spec.name}: TensorRT refuses the profile {values}; choose other sizes with --trt-profile")
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)
    config.builder_optimization_level = options.optimization_level
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # layer types for the sidecar
    if options.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if not options.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)  # on unless cleared
    return config


def _parse_failure(trt: Any, parser: Any, spec: GraphSpec) -> str:
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    lacking = sorted({error.node_operator() for error in errors if error.code().name.startswith("UNSUPPORTED")} - {""})
    if lacking:
        return (
            f"{spec.name}: TensorRT {trt.__version__} has no operator {', '.join(lacking)} as this graph uses it; "
            "export the bundle in another precision, or use ONNX Runtime"
        )
    shown = "; ".join(
        f"{error.node_operator() or 'the graph'} {error.node_name()}: {' '.join(error.desc().split())}" for error in errors[:_SHOWN_ERRORS]
    )
    more = f" and {len(errors) - _SHOWN_ERRORS} more" if len(errors) > _SHOWN_ERRORS else ""
    return f"{spec.name}: TensorRT {trt.__version__} cannot parse the graph: {shown or 'it does not say why'}{more}"


def _build_failure(spec: GraphSpec, errors: str) -> str:
    lower = errors.lower()
    if "workspace" in lower:
        remedy = "allow more with --workspace"
    elif "outofmemory" in lower or "out of memory" in lower:
        remedy = "free memory on the device, or build for smaller batches with --trt-profile"
    else:
        remedy = "try another --optimization-level, or another precision"
    return f"{spec.name}: TensorRT built no engine: {errors}; {remedy}"
