"""What ONNX Runtime's TensorRT provider is told: where it keeps its engines, and the sizes that it builds them for.

Precision is left to the graph: the provider asks TensorRT for strongly typed networks unless `trt_fp16_enable` or `trt_int8_enable` is set.
With `trt_fp16_enable` TensorRT may round what float16 graphs keep in float32, and all of a float32 graph.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path

from ..contracts.graphs import GraphSizes, GraphSpec
from ..errors import BackendError
from ..files import cache_home, describe_os_error
from .sizes import any_request

_REMEDY = "set XDG_CACHE_HOME to a folder of yours"


def provider_options(spec: GraphSpec, sizes: GraphSizes, *, graph_hash: str, max_text_length: int) -> dict[str, str]:
    """Options of `TensorrtExecutionProvider` for a graph whose file and weights have `graph_hash`.

    One profile, since the provider runs no other than its first, for every request of at most `ANY_BATCH.max` queries: with profiles given
    it builds at the start and never again, so that a larger batch is an error. Makes the folder of the cache; raises BackendError.
    """
    folder, profile = str(engine_cache(graph_hash)), any_request(max_text_length)

    def shapes(which: str) -> str:
        named = ((tensor.name, tensor.shape(sizes, **profile.sizes(which))) for tensor in spec.inputs)
        return ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in named)

    return {
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": folder,
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": folder,  # else the working directory
        **{f"trt_profile_{which}_shapes": shapes(which) for which in ("min", "opt", "max")},
    }


def without_profiles(options: Mapping[str, str]) -> dict[str, str]:
    """For graphs that the provider takes only parts of: it refuses a profile that lacks the inputs of such a part."""
    return {name: value for name, value in options.items() if not name.startswith("trt_profile_")}


def engine_cache(graph_hash: str) -> Path:
    """A folder of this user's for the engines of one graph: `XDG_CACHE_HOME` (else ~/.cache) /dqe-engine/ort-tensorrt/HASH.

    Never within a bundle, whose files may be read-only and shared. A folder for each graph, since the provider names its files by the
    nodes of a graph and not by its weights: a model that was trained again would be answered by the engine of the old one. Engines are
    machine code, so the folder is for nobody else (0700). Raises BackendError where it cannot be made, or somebody else may write to it.
    """
    try:
        root = cache_home() / "dqe-engine"
    except RuntimeError as error:
        raise BackendError(f"no cache for engines: this user has no home directory; {_REMEDY}") from error
    folder = root / "ort-tensorrt" / graph_hash[:32]
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        for path in (root, folder.parent, folder):
            path.mkdir(mode=0o700, exist_ok=True)
            found = path.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
                raise BackendError(f"{path}: engines are machine code, and others may write here; remove it, or {_REMEDY}")
    except OSError as error:
        raise BackendError(f"no cache for engines: {describe_os_error(error, folder)}, or {_REMEDY}") from error
    return folder
