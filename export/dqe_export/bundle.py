"""From a checkpoint to a bundle: export, hold against PyTorch, write the manifest, rename into place."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import msgspec

from dqe_engine.bundle import Bundle, build_file_entries
from dqe_engine.contracts.graphs import GRAPHS
from dqe_engine.contracts.manifest import MANIFEST_FILE, BundleManifest
from dqe_engine.contracts.parsing import to_json
from dqe_engine.errors import ExportError
from dqe_engine.files import atomic_directory
from dqe_training.checkpoint import Checkpoint

from .onnx_graph import OPSET, export_graph
from .parity import check_parity


def export_bundle(
    checkpoint: Checkpoint, out: Path, *, name: str = "dqe", force: bool = False, advance: Callable[[str], None] = lambda stage: None
) -> BundleManifest:
    """Write the bundle `out`, float32 ONNX. Nothing is there when it fails; an existing bundle needs `force`.

    Raises ExportError when a graph does not match PyTorch, or when `out` exists without `force`.
    """
    if out.exists() and not force:
        raise ExportError(f"{out}: exists already; choose another name, or replace it with --force")
    model = checkpoint.model.eval()
    try:
        with atomic_directory(out, replace=force, marker=MANIFEST_FILE) as temporary:
            parity = []
            for spec in GRAPHS:
                advance(f"exporting {spec.name}")
                export_graph(spec, model, temporary / spec.file)
                advance(f"checking {spec.name}")
                parity.append(check_parity(spec, model, temporary / spec.file))
            (temporary / checkpoint.meta.tokenizer.file).write_bytes((checkpoint.directory / checkpoint.meta.tokenizer.file).read_bytes())
            manifest = BundleManifest(
                name=name,
                producer=f"dqe-engine {version('dqe-engine')}",
                opset=OPSET,
                model=msgspec.to_builtins(checkpoint.meta.config.model),
                sizes=model.sizes,
                graphs=GRAPHS,
                preprocessing=checkpoint.meta.config.model.preprocessing,
                tokenizer=checkpoint.meta.tokenizer,
                vocabulary=checkpoint.vocabulary,
                zones=checkpoint.meta.serving_zones,
                parity=tuple(parity),
                files=build_file_entries(temporary),
            )
            (temporary / MANIFEST_FILE).write_bytes(to_json(manifest))
            advance("verifying")
            Bundle.load(temporary)
    except OSError as error:  # without an error number: `atomic_directory` says why it does not replace what is there
        raise ExportError(f"{out}: cannot be written ({error.strerror})" if error.errno else str(error)) from error
    return manifest
