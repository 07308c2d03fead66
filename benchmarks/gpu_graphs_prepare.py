"""What `benchmarks/gpu_graphs.sh` takes to a machine with a GPU: graphs without weights, and how to make the weights there.

    python -m benchmarks.gpu_graphs_prepare .gpu2/graphs --small demo/runs/dqe-0/model            # a trained model, its weights with it
    python -m benchmarks.gpu_graphs_prepare .gpu2/graphs --full query_encoder vision_encoder      # BLIP-2 ViT-g; 14 GiB of memory

Each model is a folder: `model.json` (configuration, and per graph where its weights come from), `GRAPH-PRECISION.onnx`, and of a trained
model `weights.safetensors` in float16, to which the graphs' weights are rounded too.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
import numpy as np
import torch
from safetensors.numpy import save_file

from dqe_engine.contracts.graphs import QUERY_ENCODER, VISION_ENCODER, GraphSpec
from dqe_engine.contracts.preprocessing import PreprocessingSpec
from dqe_export.graphs import graph_module
from dqe_export.onnx_graph import export_graph
from dqe_export.precision import convert
from dqe_training.checkpoint import load_checkpoint
from dqe_training.config import ModelConfig
from dqe_training.data.garments.catalog import vocabulary
from dqe_training.model import DQEModel
from dqe_training.model.cross_attention import upstream_attention

from .export_full_size import QFORMER, TOWERS
from .gpu_graphs_model import SPECS, UPSTREAM, shapes_of
from .weightless import Values, random_values, strip, unfilled


@torch.no_grad()
def prepare(folder: Path, model: DQEModel, spec: GraphSpec, values: Values, work: Path) -> dict[str, Any]:
    """Export `spec` in float32 and float16 and strip both; entries of `model.json` by file name. `model` gets `values`."""
    module, entries = graph_module(spec, model), {}
    shapes = shapes_of(module)
    for name, parameter in module.named_parameters():
        if name in shapes:
            parameter.copy_(torch.from_numpy(values(name, shapes[name])))
    for mark in ("", f"-{UPSTREAM}") if spec == QUERY_ENCODER else ("",):
        sources = {precision: work / precision / f"{spec.name}{mark}.onnx" for precision in ("f32", "f16")}
        for source in sources.values():
            source.parent.mkdir(exist_ok=True)
        with upstream_attention(model.qformer) if mark else nullcontext():
            export_graph(spec, model, sources["f32"])
        if spec == VISION_ENCODER:  # room for a second copy of the tower
            model.to("meta")
            gc.collect()
        convert(sources["f32"], sources["f16"], "float16")
        for precision, source in sources.items():
            path = folder / f"{spec.name}-{precision}{mark}.onnx"
            entries[path.name] = strip(source, path, shapes, values)
            for file in source.parent.glob(f"{source.name}*"):
                file.unlink()
            kept = unfilled(path, entries[path.name])
            print(f"{path}: {path.stat().st_size:,} bytes, {entries[path.name]['bytes']:,} left out; kept {kept}")
    return entries


def describe(folder: Path, model: DQEModel) -> dict[str, Any]:
    """`model.json` as it is, so that a graph can be added, or anew."""
    path = folder / "model.json"
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_bytes())
        return found
    words = model.embeddings.word_embeddings.num_embeddings
    return {"config": msgspec.to_builtins(model.config), "vocabulary": msgspec.to_builtins(model.vocabulary), "words": words, "graphs": {}}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu_graphs_prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--small", type=Path, help="checkpoint of a small trained model")
    parser.add_argument("--full", nargs="*", choices=SPECS, default=(), help="graphs of BLIP-2 at its full size, with random weights")
    options = parser.parse_args(arguments)
    with TemporaryDirectory() as work:
        if options.small:
            model = load_checkpoint(options.small).model
            rounded = {name: p.detach().numpy().astype(np.float16) for name, p in model.named_parameters()}
            folder = options.out / "small"
            folder.mkdir(parents=True, exist_ok=True)
            save_file(rounded, folder / "weights.safetensors")
            about = describe(folder, model)
            for spec in SPECS.values():
                about["graphs"] |= prepare(
                    folder, model, spec, lambda name, shape: rounded[name.removeprefix("model.")].astype(np.float32), Path(work)
                )
            (folder / "model.json").write_text(json.dumps(about))
        for name in options.full:
            config = ModelConfig(preprocessing=PreprocessingSpec(image_size=224), vision=TOWERS["vit-g"], qformer=QFORMER)
            assert QFORMER.vocab_size is not None
            model = DQEModel(config, vocabulary(), QFORMER.vocab_size, empty_vision=name != VISION_ENCODER.name).eval()
            folder = options.out / "full"
            folder.mkdir(parents=True, exist_ok=True)
            about = describe(folder, model)
            about["graphs"] |= prepare(folder, model, SPECS[name], random_values, Path(work))
            (folder / "model.json").write_text(json.dumps(about))
    return 0


if __name__ == "__main__":
    sys.exit(main())
