"""Attribute heads alone: exported to a folder of their own, or into a bundle whose encoder they were trained on."""

from __future__ import annotations

import dataclasses
from importlib.metadata import version
from pathlib import Path

import msgspec

from dqe_engine.bundle import Bundle, build_file_entries
from dqe_engine.contracts.graphs import ATTRIBUTE_HEADS, QUERY_ENCODER
from dqe_engine.contracts.manifest import HEADS_FILE, BundleManifest, HeadsManifest
from dqe_engine.contracts.parsing import to_json
from dqe_engine.errors import ExportError, InputError
from dqe_engine.files import atomic_directory, describe_write_error, scratch_directory
from dqe_engine.heads import load_heads, replace_heads
from dqe_training.checkpointing.checkpoint import Checkpoint

from .answers import check_retrieval
from .bundle import Advance, ExportOptions, write_graph
from .calibration import parity_inputs
from .differences import TOLERANCES
from .identity import encoder_identity
from .onnx_graph import OPSET
from .parity import check_composition
from .reading import check_reading


def export_heads(
    checkpoint: Checkpoint, out: Path, options: ExportOptions | None = None, *, force: bool = False, advance: Advance = lambda stage: None
) -> HeadsManifest:
    """Write the folder `out`, for `dqe_engine.heads.replace_heads`; errors are those of `export_bundle`."""
    options = options or ExportOptions()
    try:
        with atomic_directory(out, replace=force, marker=HEADS_FILE) as temporary:
            return _fill(checkpoint, temporary, options, advance)
    except OSError as error:
        raise ExportError(describe_write_error(error, out)) from error


def export_heads_into(
    checkpoint: Checkpoint,
    bundle: Path,
    options: ExportOptions | None = None,
    *,
    new_vocabulary: bool = False,
    advance: Advance = lambda stage: None,
) -> BundleManifest:
    """Replace the heads of `bundle` by the checkpoint's, in the bundle's precision, after its queries were held against PyTorch's.

    Raises what `replace_heads` does, and ParityError; the bundle is then as it was.
    """
    loaded = Bundle.load(bundle)
    loaded.require_own()
    precision = loaded.manifest.precision
    options = dataclasses.replace(options or ExportOptions(), precision=precision)

    def check(directory: Path, manifest: BundleManifest) -> BundleManifest:
        advance("checking the composed query")
        inputs = parity_inputs(QUERY_ENCODER, checkpoint, options.data, options.precision)
        composed = check_composition(checkpoint.model, directory, precision=options.precision, inputs=inputs)
        check_reading(checkpoint, directory)
        retrieval = None
        if (data := options.data) is not None:
            advance(f"answering the queries of {data.name}")
            retrieval = check_retrieval(checkpoint, directory, data.evaluation, data.images, data=data.name, precision=options.precision)
        return msgspec.structs.replace(manifest, parity=(*manifest.parity, composed), retrieval=retrieval)

    bundle = bundle.absolute()
    try:
        with scratch_directory(bundle.with_name(f"{bundle.name}.heads")) as scratch:
            _fill(checkpoint, scratch, options, advance)
            return replace_heads(bundle, scratch, new_vocabulary=new_vocabulary, check=check)
    except OSError as error:
        raise ExportError(describe_write_error(error, bundle)) from error


def _fill(checkpoint: Checkpoint, directory: Path, options: ExportOptions, advance: Advance) -> HeadsManifest:
    if not checkpoint.vocabulary.attributes:
        raise InputError(
            f"{checkpoint.directory}: has no attribute heads; train some with start={checkpoint.directory} finetune=attributes"
        )
    parity = write_graph(ATTRIBUTE_HEADS, checkpoint, directory, options, advance).parity
    manifest = HeadsManifest(
        producer=f"dqe-engine {version('dqe-engine')}",
        precision=options.precision,
        opset=OPSET,
        encoder_hash=encoder_identity(checkpoint),
        sizes=checkpoint.model.sizes,
        vocabulary=checkpoint.vocabulary,
        vocabulary_hash=checkpoint.vocabulary.hash,
        zones=checkpoint.meta.serving_zones,
        tolerance=TOLERANCES[options.precision],
        parity=parity,
        files=build_file_entries(directory),
    )
    (directory / HEADS_FILE).write_bytes(to_json(manifest))
    return load_heads(directory)
