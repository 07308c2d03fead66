"""All engines of a bundle, built and checked in a folder that appears only when the last one has passed."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from dqe_engine.bundle import Bundle
from dqe_engine.contracts.engines import ENGINES_FILE, ENGINES_FOLDER, EngineEntry, EngineManifest, folder_name
from dqe_engine.contracts.graphs import GraphSpec
from dqe_engine.contracts.manifest import FileEntry
from dqe_engine.contracts.parsing import to_json
from dqe_engine.errors import BundleError, DQEError, ExportError
from dqe_engine.files import atomic_directory, atomic_write, describe_os_error, describe_write_error, read_regular, sha256_of
from dqe_engine.sessions import OnnxSession
from dqe_engine.tensorrt.api import Logger, import_tensorrt, make_logger
from dqe_engine.tensorrt.cuda import Cuda, Gpu
from dqe_engine.tensorrt.engines import read_sidecar
from dqe_engine.tensorrt.session import TensorRTSession

from ..differences import TOLERANCES
from .build import build_engine, inspect_layers
from .check import check_engine
from .limits import check_gpu
from .plan import BuildOptions

TIMING_CACHE = "timing.cache"
BUILD_LOG = "build.log"


def engine_file(spec: GraphSpec) -> str:
    return f"{spec.name}.engine"


def target_folder(gpu: Gpu, tensorrt: str, options: BuildOptions) -> str:
    """Where engines go, relative to the bundle, such as "tensorrt/nvidia-l4-sm89-10.16"."""
    name = folder_name(
        gpu.name, gpu.compute_capability, tensorrt,
        hardware_compatible=options.hardware_compatible, version_compatible=options.version_compatible,
    )  # fmt: skip
    return f"{ENGINES_FOLDER}/{name}"


def build_engines(
    bundle: Bundle, options: BuildOptions, *, force: bool = False, advance: Callable[[str], None] = lambda stage: None
) -> tuple[Path, EngineManifest]:
    """Build, check and write an engine per graph; the bundle's own files and its hash stay as they are.

    Existing engines of the same folder need `force`, and stay until the new ones are complete. A build that fails or is
    interrupted leaves nothing but TensorRT's log, in a temporary file that the error names. Raises BackendError without a GPU or
    TensorRT, ExportError where a graph cannot be built, ParityError where an engine differs from ONNX Runtime.
    """
    gpu, trt = Cuda().gpu(), import_tensorrt()
    check_gpu(gpu, options)
    folder = bundle.path / target_folder(gpu, trt.__version__, options)
    if folder.exists() and not force:
        raise ExportError(f"{folder}: exists already; replace these engines with --force")
    cache = named_cache(Path(options.timing_cache)) if options.timing_cache is not None else _earlier_cache(folder, gpu, trt.__version__)
    log = _Log(trt, bundle.path)
    with (
        log.kept_on_failure(),
        _write_errors(folder),
        _removed_if_empty(folder.parent),
        atomic_directory(folder, replace=force, marker=ENGINES_FILE) as temporary,
    ):
        engines = []
        for spec in bundle.manifest.graphs:
            entry, cache = _build_one(trt, bundle, spec, options, temporary, cache, log.of(spec), advance)
            engines.append(entry)
        manifest = _sidecar(bundle, gpu, trt, options, tuple(engines))
        (temporary / ENGINES_FILE).write_bytes(to_json(manifest))
        (temporary / BUILD_LOG).write_text(log.text(), encoding="utf-8")
        if cache:
            (temporary / TIMING_CACHE).write_bytes(cache)
        if options.timing_cache is not None and cache:  # before the folder appears: one that cannot be written is a failed build
            with atomic_write(Path(options.timing_cache)) as stream:
                stream.write(cache)
    return folder, manifest


@contextlib.contextmanager
def _write_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ExportError(describe_write_error(error, folder)) from error


def _build_one(
    trt: Any,
    bundle: Bundle,
    spec: GraphSpec,
    options: BuildOptions,
    folder: Path,
    cache: bytes,
    logger: Logger,
    advance: Callable[[str], None],
) -> tuple[EngineEntry, bytes]:
    advance(f"building {spec.name}")
    path = bundle.path / spec.file
    needed = options.timing_cache is not None
    built = build_engine(trt, path, spec, bundle.sizes, options, timing_cache=cache, needed=needed, logger=logger)
    file = folder / engine_file(spec)
    file.write_bytes(built.plan)
    layers = inspect_layers(trt, built.plan, logger, host_code=options.version_compatible)
    advance(f"checking {spec.name}")
    # Products in TF32 have float16's ten bits of mantissa.
    tolerance = TOLERANCES["float16"] if options.tf32 and bundle.manifest.precision == "float32" else bundle.manifest.tolerance
    session = TensorRTSession(built.plan, spec, bundle.sizes, host_code=options.version_compatible)
    parity = check_engine(
        spec,
        bundle.sizes,
        session,
        OnnxSession(path, spec, bundle.sizes, provider="cpu"),
        options.profiles,
        captured=session.graph_shapes,
        vocab_size=_vocab_size(bundle),
        tolerance=tolerance,
    )
    entry = EngineEntry(
        graph=spec.name,
        graph_hash=bundle.manifest.graph_hash(spec),
        file=FileEntry(path=file.name, size=len(built.plan), sha256=sha256_of(file)),
        build_seconds=round(built.seconds, 3),
        layers=sum(layers.values()),
        layer_types=layers,
        device_memory=session.device_memory,
        graph_shapes=session.graph_shapes,
        tolerance=tolerance,
        parity=parity,
    )
    return entry, built.timing_cache or cache


class _Log:
    """What TensorRT says while engines are built, by graph."""

    def __init__(self, trt: Any, bundle: Path) -> None:
        self._trt, self._bundle = trt, bundle
        self._loggers: dict[str, Logger] = {}

    def of(self, spec: GraphSpec) -> Logger:
        """A logger of its own: no graph's messages push out another's, and none is blamed for another's errors."""
        self._loggers[spec.name] = make_logger(self._trt)
        return self._loggers[spec.name]

    def text(self) -> str:
        """Without the bundle's path, since engines travel with their bundle."""
        parts = ("\n".join((f"== {graph}", *logger.lines)) for graph, logger in self._loggers.items())
        return "\n".join(parts).replace(str(self._bundle), "BUNDLE") + "\n"

    @contextlib.contextmanager
    def kept_on_failure(self) -> Iterator[None]:
        """Write the log where it outlives the failed build, and add its path to the message. A full disk does not hide why it failed."""
        try:
            yield
        except DQEError as error:
            if not any(logger.lines for logger in self._loggers.values()):
                raise
            with contextlib.suppress(OSError):
                with tempfile.NamedTemporaryFile("w", prefix="dqe-trt-", suffix=".log", delete=False, encoding="utf-8") as file:
                    file.write(self.text())
                raise type(error)(f"{error}; TensorRT's log: {file.name}") from error
            raise


def _sidecar(bundle: Bundle, gpu: Gpu, trt: Any, options: BuildOptions, engines: tuple[EngineEntry, ...]) -> EngineManifest:
    return EngineManifest(
        precision=bundle.manifest.precision,
        gpu=gpu.name,
        compute_capability=gpu.compute_capability,
        tensorrt=trt.__version__,
        cuda_driver=gpu.driver,
        hardware_compatible=options.hardware_compatible,
        version_compatible=options.version_compatible,
        tf32=options.tf32,
        optimization_level=options.optimization_level,
        workspace=options.workspace,
        profiles=options.profiles,
        engines=engines,
    )


def _earlier_cache(folder: Path, gpu: Gpu, tensorrt: str) -> bytes:
    """That of the engines that are replaced, if they were built on such a device by this version; else b""."""
    with contextlib.suppress(BundleError, OSError):  # damaged engines are what --force is for
        earlier = read_sidecar(folder)
        if (earlier.gpu, earlier.tensorrt) == (gpu.name, tensorrt):
            return read_regular(folder / TIMING_CACHE)
    return b""


def named_cache(path: Path) -> bytes:
    """The user's timing cache, which need not exist yet. Raises ExportError where it cannot be read, or not be written in the end: a build
    takes minutes."""
    if path.parent.is_dir() and not os.access(path.parent, os.W_OK):
        raise ExportError(f"timing cache {path}: its folder cannot be written to; name another file with --timing-cache")
    try:
        return read_regular(path)
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise ExportError(f"timing cache {describe_os_error(error, path)}") from error


def _vocab_size(bundle: Bundle) -> int:
    return int(Tokenizer.from_file(str(bundle.path / bundle.manifest.tokenizer.file)).get_vocab_size())


@contextlib.contextmanager
def _removed_if_empty(folder: Path) -> Iterator[None]:
    """A bundle that had no engines has no empty folder for them either after a failed build."""
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()
