"""What `benchmarks/gpu_graphs.sh` takes to a machine with a GPU: graphs without weights, and how to make the weights there.

    python -m benchmarks.gpu_graphs_prepare .gpu2/graphs --small demo/runs/dqe-0/model            # a trained model, its weights with it
    python -m benchmarks.gpu_graphs_prepare .gpu2/graphs --full query_encoder vision_encoder      # BLIP-2 ViT-g; 12 GiB of memory

Each model is a folder: `model.json` (configuration, and per graph where its weights come from), `GRAPH-PRECISION.onnx`, and of a trained
model `weights.safetensors` in float16, to which the graphs' weights are rounded too.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file

from dqe_engine.contracts.graphs import QUERY_ENCODER, VISION_ENCODER, GraphSpec
from dqe_engine.contracts.preprocessing import PreprocessingSpec
from dqe_export.graphs import graph_module
from dqe_export.onnx_graph import export_graph
from dqe_export.precision import convert
from dqe_training.checkpointing.checkpoint import load_checkpoint
from dqe_training.config import ModelConfig
from dqe_training.data.garments.catalog import vocabulary
from dqe_training.model import DQEModel
from dqe_training.model.cross_attention import upstream_attention
from dqe_training.model.gpu_attention import gpu_attention

from .export_full_size import QFORMER, TOWERS
from .gpu_graphs_model import GPU_FORM, SPECS, UPSTREAM, shapes_of
from .weightless import Values, random_values, strip, unfilled


@torch.no_grad()
def prepare(folder: Path, model: DQEModel, spec: GraphSpec, values: Values, work: Path, *, last: bool) -> dict[str, Any]:
    """Export `spec` in float32 and float16, and in the form for GPUs in float16, and strip each; entries of `model.json` by file name.

    `model` gets `values`, and with `last` loses them again: room for a second copy of a tower.
    """
    module, entries = graph_module(spec, model), {}
    shapes = shapes_of(module)
    for name, parameter in module.named_parameters():
        if name in shapes:
            parameter.copy_(torch.from_numpy(values(name, shapes[name])))
    forms: dict[str, AbstractContextManager[None]] = {"": nullcontext()}
    if spec == QUERY_ENCODER:
        forms[f"-{UPSTREAM}"] = upstream_attention(model.qformer)
    forms[f"-{GPU_FORM}"] = gpu_attention(model)
    for mark, form in forms.items():
        sources = {precision: work / precision / f"{spec.name}{mark}.onnx" for precision in ("f32", "f16")}
        for source in sources.values():
            source.parent.mkdir(exist_ok=True)
        with form:
            export_graph(spec, model, sources["f32"])
        if last and mark == f"-{GPU_FORM}":
            model.to("meta")
            gc.collect()
        convert(sources["f32"], sources["f16"], "float16")
        for precision, source in sources.items():
            path = folder / f"{spec.name}-{precision}{mark}.onnx"
            if (precision, mark) != ("f32", f"-{GPU_FORM}"):
                entries[path.name] = strip(source, path, shapes, values)
            for file in source.parent.glob(f"{source.name}*"):
                file.unlink()
            if path.name not in entries:
                continue
            kept = unfilled(path, entries[path.name])
            print(f"{path}: {path.stat().st_size:,} bytes, {entries[path.name]['bytes']:,} left out; kept {kept}")
    return entries


def small(folder: Path, checkpoint: Path, work: Path) -> None:
    """Both graphs of a trained model."""
    model = load_checkpoint(checkpoint).model
    rounded = {name: parameter.detach().numpy().astype(np.float16) for name, parameter in model.named_parameters()}
    save_file(rounded, folder / "weights.safetensors")

    def values(name: str, shape: Sequence[int]) -> NDArray[np.float32]:
        return rounded[name.removeprefix("model.")].astype(np.float32)

    about = _description(model)
    for spec in SPECS.values():
        about["graphs"] |= prepare(folder, model, spec, values, work, last=False)
    (folder / "model.json").write_text(json.dumps(about))


def full_size(folder: Path, spec: GraphSpec, work: Path) -> None:
    """One graph of BLIP-2; the other, if it is there, stays."""
    config = ModelConfig(preprocessing=PreprocessingSpec(image_size=224), vision=TOWERS["vit-g"], qformer=QFORMER)
    assert QFORMER.vocab_size is not None
    model = DQEModel(config, vocabulary(), QFORMER.vocab_size, empty_vision=spec != VISION_ENCODER).eval()
    path, about = folder / "model.json", _description(model)
    if path.exists():
        about["graphs"] = json.loads(path.read_bytes())["graphs"]
    about["graphs"] |= prepare(folder, model, spec, random_values, work, last=True)
    path.write_text(json.dumps(about))


def _description(model: DQEModel) -> dict[str, Any]:
    words = model.embeddings.word_embeddings.num_embeddings
    return {"config": msgspec.to_builtins(model.config), "vocabulary": msgspec.to_builtins(model.vocabulary), "words": words, "graphs": {}}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu_graphs_prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--small", type=Path, help="checkpoint of a small trained model")
    parser.add_argument("--full", nargs="*", choices=SPECS, default=(), help="graphs of BLIP-2 at its full size, with random weights")
    options = parser.parse_args(arguments)
    for name in ("small", "full"):
        (options.out / name).mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as work:
        if options.small:
            small(options.out / "small", options.small, Path(work))
        for name in options.full:
            full_size(options.out / "full", SPECS[name], Path(work))
    return 0


if __name__ == "__main__":
    sys.exit(main())
