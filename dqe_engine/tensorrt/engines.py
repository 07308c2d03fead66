"""The engines of a bundle: which folder fits this GPU and TensorRT, verified against its sidecar before anything is loaded."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec

from ..contracts.engines import ENGINES_FILE, ENGINES_FOLDER, ENGINES_SCHEMA_VERSION, EngineEntry, EngineManifest
from ..contracts.graphs import GraphSizes, GraphSpec
from ..contracts.parsing import parse_json
from ..errors import BackendError, BundleError
from ..files import describe_os_error
from .api import import_tensorrt
from .cuda import Cuda, Gpu
from .session import TensorRTSession


class OtherSchemaError(BundleError):
    """A sidecar that another release of this package wrote: its engines are not damaged, only not for this one."""


class _Schema(msgspec.Struct):
    """What a sidecar of any release says of itself."""

    schema_version: int


def engine_folders(bundle: Path) -> list[Path]:
    """Folders of engines in a bundle, by name; none where it was exported without TensorRT."""
    return sorted(file.parent for file in (bundle / ENGINES_FOLDER).glob(f"[!.]*/{ENGINES_FILE}"))


def open_engine(bundle: Path, graph_hash: str, graph: GraphSpec, sizes: GraphSizes) -> TensorRTSession:
    """A session on the engine of `graph` that fits this machine.

    Raises BackendError where there is no GPU, no TensorRT, or no folder of engines for them, saying which folders there
    are and why each is refused; BundleError where the engine or its sidecar is damaged.
    """
    gpu = Cuda().gpu()
    version = str(import_tensorrt().__version__)
    folder, manifest = select_folder(bundle, graph, graph_hash, gpu, version)
    entry = next((entry for entry in manifest.engines if entry.graph == graph.name), None)
    if entry is None:
        raise BundleError(f"{folder / ENGINES_FILE}: no engine for {graph.name}; build the engines again")
    return TensorRTSession(read_plan(folder, entry), graph, sizes, host_code=manifest.version_compatible)


def select_folder(bundle: Path, graph: GraphSpec, graph_hash: str, gpu: Gpu, tensorrt: str) -> tuple[Path, EngineManifest]:
    """The folder whose engine of `graph` runs here. Those made for just this GPU and version come before the compatible ones."""
    refused, found = [], []
    for folder in engine_folders(bundle):
        try:
            manifest = read_sidecar(folder)
        except OtherSchemaError:
            refused.append(f"{folder.name} (built with another release of dqe-engine)")
            continue
        reason = manifest.refusal(
            gpu=gpu.name, compute_capability=gpu.compute_capability, tensorrt=tensorrt, graph=graph.name, graph_hash=graph_hash
        )
        if reason:
            refused.append(f"{folder.name} ({reason})")
        else:
            found.append((manifest.hardware_compatible + manifest.version_compatible, folder, manifest))
    if not found:
        raise BackendError(
            f"{bundle}: no TensorRT engine for {gpu.name} (compute capability {gpu.compute_capability}) and TensorRT {tensorrt}; "
            f"it has {', '.join(refused) or 'none at all'}; build on this machine with: dqe-export --trt --bundle {bundle}"
        )
    _, folder, manifest = min(found, key=lambda item: item[:2])
    return folder, manifest


def read_sidecar(folder: Path) -> EngineManifest:
    """Raises BundleError for one that is unreadable, OtherSchemaError for one of another schema."""
    where = folder / ENGINES_FILE
    try:
        raw = where.read_bytes()
    except OSError as error:
        raise BundleError(describe_os_error(error, where)) from error
    version = parse_json(_Schema, raw, where=str(where), error=BundleError).schema_version
    if version != ENGINES_SCHEMA_VERSION:
        raise OtherSchemaError(f"{where}: schema version {version}, expected {ENGINES_SCHEMA_VERSION}; build the engines again")
    return parse_json(EngineManifest, raw, where=str(where), error=BundleError)


def read_plan(folder: Path, entry: EngineEntry) -> bytes:
    """An engine's bytes, of the size and SHA-256 that the sidecar says: a plan is machine code, so there is no option to skip this."""
    name = entry.file.path
    if not name or Path(name).name != name or name in (".", "..") or "\0" in name:
        raise BundleError(f"{folder / ENGINES_FILE}: {name!r} is not a plain file name; do not use these engines")
    file = folder / name
    try:
        plan = file.read_bytes()
    except FileNotFoundError as error:
        raise BundleError(f"{file}: missing; build the engines again") from error
    except OSError as error:
        raise BundleError(describe_os_error(error, file)) from error
    if len(plan) != entry.file.size or hashlib.sha256(plan).hexdigest() != entry.file.sha256:
        raise BundleError(f"{file}: its bytes changed since the build (SHA-256 differs); build the engines again")
    return plan
