"""From a checkpoint to a bundle: export, hold against PyTorch, convert, hold again, report, write the manifest, rename into place."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import msgspec

from dqe_engine.bundle import Bundle, build_file_entries
from dqe_engine.contracts.graphs import QUERY_ENCODER, GraphSpec, graphs_of
from dqe_engine.contracts.manifest import MANIFEST_FILE, BundleManifest, GraphParity, Precision, Target
from dqe_engine.contracts.parsing import to_json
from dqe_engine.errors import ExportError, InputError, ParityError
from dqe_engine.files import atomic_directory, describe_write_error
from dqe_training.checkpointing.checkpoint import Checkpoint
from dqe_training.model import DQEModel
from dqe_training.model.cross_attention import upstream_attention
from dqe_training.model.gpu_attention import gpu_attention

from .answers import check_retrieval
from .calibration import EvaluationData, calibration_inputs, is_large, parity_inputs, scale_inputs
from .converted import check_conversion
from .differences import TOLERANCES
from .folding import layers_left
from .graphs import graph_module
from .identity import encoder_identity
from .latency import time_graphs
from .onnx_graph import OPSET, export_graph, weights_beside
from .parity import Reference, check_composition, check_parity, check_source
from .precision import Int8, convert
from .reading import check_reading
from .report import ExportReport, GraphReport, write_report
from .sensitivity import LayerSensitivity, nodes_of, sweep

_WORK = "work"

Advance = Callable[[str], None]


@dataclass(frozen=True)
class ExportOptions:
    """`shown`: `data` must show that the recall is kept (`check_retrieval`).

    `target`: what the graphs' form is for. `why`: the reason for the precision, where it was not the caller's choice. `data`: what the
    bundle's answers are compared on, and what "int8-static" reads its scales off.

    Raises InputError for "int8-static" without `data`, and for "int8" for a GPU.
    """

    name: str = "dqe"
    precision: Precision = "float32"
    target: Target = "cpu"
    why: str = ""
    data: EvaluationData | None = None
    shown: bool = False

    def __post_init__(self) -> None:
        if self.precision == "int8-static" and self.data is None:
            raise InputError("int8-static reads the scales of activations off real queries; name an evaluation set with --data")
        if self.precision == "int8" and self.target == "cuda":
            raise InputError("int8 scales activations while it runs, which is for CPUs; for --target cuda take f16 or int8-static")


def export_bundle(
    checkpoint: Checkpoint, out: Path, options: ExportOptions | None = None, *, force: bool = False, advance: Advance = lambda stage: None
) -> BundleManifest:
    """Write the bundle `out`. Nothing is there when it fails; an existing bundle needs `force`.

    Raises ParityError when a graph or the bundle's answers do not match PyTorch, ExportError when `out` exists without `force`.
    """
    options = options or ExportOptions()
    if out.exists() and not force:
        raise ExportError(f"{out}: exists already; choose another name, or replace it with --force")
    try:
        with atomic_directory(out, replace=force, marker=MANIFEST_FILE) as temporary:
            return _fill(checkpoint, temporary, options, advance)
    except OSError as error:  # without an error number: `atomic_directory` says why it does not replace what is there
        raise ExportError(describe_write_error(error, out)) from error


def _fill(checkpoint: Checkpoint, directory: Path, options: ExportOptions, advance: Advance) -> BundleManifest:
    model, config = checkpoint.model.eval(), checkpoint.meta.config.model
    written = [write_graph(spec, checkpoint, directory, options, advance) for spec in graphs_of(model.sizes)]
    graphs = [graph.parity for graph in written]
    advance("checking the composed query")
    inputs = parity_inputs(QUERY_ENCODER, checkpoint, options.data, options.precision)
    graphs.append(check_composition(model, directory, precision=options.precision, inputs=inputs))
    (directory / checkpoint.meta.tokenizer.file).write_bytes((checkpoint.directory / checkpoint.meta.tokenizer.file).read_bytes())
    manifest = BundleManifest(
        name=options.name,
        producer=f"dqe-engine {version('dqe-engine')}",
        precision=options.precision,
        target=options.target,
        opset=OPSET,
        model=msgspec.to_builtins(config),
        encoder_hash=encoder_identity(checkpoint),
        sizes=model.sizes,
        graphs=graphs_of(model.sizes),
        preprocessing=config.preprocessing,
        tokenizer=checkpoint.meta.tokenizer,
        vocabulary=checkpoint.vocabulary,
        zones=checkpoint.meta.serving_zones,
        tolerance=TOLERANCES[options.precision],
        parity=tuple(graphs),
        imported=checkpoint.meta.imported,
        files=build_file_entries(directory),
    )
    _write_manifest(directory, manifest)
    advance("reading images and texts")
    check_reading(checkpoint, directory)
    if (data := options.data) is not None:
        advance(f"answering the queries of {data.name}")
        retrieval = check_retrieval(
            checkpoint, directory, data.evaluation, data.images, data=data.name, precision=options.precision, shown=options.shown
        )
        manifest = msgspec.structs.replace(manifest, retrieval=retrieval)
        _write_manifest(directory, manifest)
    latency, company = time_graphs(model, directory, advance)
    reports = [
        GraphReport(
            graph=spec.name, size=_size(directory / spec.file), float32_size=graph.float32_size, latency=latency[spec.name],
            layers=graph.layers,
        )
        for spec, graph in zip(manifest.graphs, written, strict=True)
    ]  # fmt: skip
    write_report(directory, ExportReport.of(manifest, reports, company=company, why=options.why))
    advance("verifying")
    Bundle.load(directory)
    return manifest


def _write_manifest(directory: Path, manifest: BundleManifest) -> None:
    (directory / MANIFEST_FILE).write_bytes(to_json(manifest))


class WrittenGraph(NamedTuple):
    """`float32_size`: bytes of the graph before its conversion; `layers`: int8's sweep, the most sensitive first."""

    parity: GraphParity
    float32_size: int
    layers: tuple[LayerSensitivity, ...]


def write_graph(spec: GraphSpec, checkpoint: Checkpoint, directory: Path, options: ExportOptions, advance: Advance) -> WrittenGraph:
    """Export one graph, convert it and hold it against PyTorch. Raises ParityError."""
    model, precision = checkpoint.model, options.precision
    work, path = directory / _WORK, directory / spec.file
    work.mkdir()
    source = path if precision == "float32" else work / spec.file
    advance(f"exporting {spec.name}")
    with _form(model, options):
        export_graph(spec, model, source)
    float32_size, reference = _size(source), Reference(spec, model)
    if source != path:
        advance(f"checking {spec.name} before it is rounded")
        check_source(reference, source)
    layers: list[LayerSensitivity] = []
    if precision in ("int8", "int8-static"):
        parity, layers = _write_int8(reference, checkpoint, source, path, precision, options.data, advance)
    else:
        if precision == "float16":
            convert(source, path, precision)
        advance(f"checking {spec.name}")
        parity = check_parity(spec, model, path, precision=precision, reference=reference)
    if source != path:
        check_conversion(spec, source, path)
    shutil.rmtree(work)
    return WrittenGraph(parity, float32_size, tuple(layers))


def _form(model: DQEModel, options: ExportOptions) -> AbstractContextManager[None]:
    if options.target == "cuda":
        return gpu_attention(model)
    return upstream_attention(model.qformer) if options.precision in ("int8", "int8-static") else nullcontext()


def _write_int8(
    reference: Reference, checkpoint: Checkpoint, source: Path, path: Path, precision: Int8, data: EvaluationData | None, advance: Advance
) -> tuple[GraphParity, list[LayerSensitivity]]:
    """Keep none, then 1, 2, 4, ... of the most sensitive layers in float32, until the graph is as close to PyTorch as int8 must be.

    A large tower, whose sweep takes minutes, is swept only where it has to be.
    """
    spec, model, calibration = reference.spec, checkpoint.model, None
    if precision == "int8-static":
        assert data is not None
        advance(f"calibrating {spec.name}")
        calibration = {name: value.numpy() for name, value in scale_inputs(spec, checkpoint, data).items()}

    def sensitivities() -> list[LayerSensitivity]:
        inputs = calibration_inputs(spec, checkpoint, data)
        found = sweep(spec.name, module, inputs, precision, advance=lambda layer: advance(f"rounding {spec.name}: {layer}"))
        left = layers_left(source, module)
        return [layer for layer in found if layer.layer in left]

    with upstream_attention(model.qformer):
        module = graph_module(spec, model)
        layers = [] if is_large(spec, model) else sensitivities()
        if (inputs := parity_inputs(spec, checkpoint, data, precision)) is not None:
            reference = Reference(spec, model, inputs)
        kept = 0
        while True:
            advance(f"checking {spec.name} with {kept} layers in float32")
            convert(source, path, precision, keep=nodes_of(source, module, [s.layer for s in layers[:kept]]), inputs=calibration)
            try:
                parity = check_parity(spec, model, path, precision=precision, reference=reference)
            except ParityError:
                layers = layers or sensitivities()
                if kept >= len(layers):
                    raise
                kept = min(max(1, 2 * kept), len(layers))
                continue
            return parity, [msgspec.structs.replace(s, kept=i < kept) for i, s in enumerate(layers)]


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in (path, weights_beside(path)) if file.exists())
