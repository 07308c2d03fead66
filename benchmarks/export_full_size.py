"""Exports of BLIP-2 at its full size, with random weights: time, memory, sizes, and latency beside PyTorch from the exports' own reports.

    python -m benchmarks.export_full_size --tower vit-g --precisions f32,f16,int8
    python -m benchmarks.export_full_size --tower vit-g --blocks 1 --base-query two_pass --precisions int8 --keep

Random weights say nothing about accuracy: float16 and int8 are judged on trained models (docs/export.md).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

import msgspec
import torch

from benchmarks import machine, report
from dqe_engine.contracts.preprocessing import PreprocessingSpec
from dqe_training.checkpointing.checkpoint import Progress, save_checkpoint
from dqe_training.config import BaseQuery, ModelConfig, QFormerConfig, TrainConfig, VisionConfig
from dqe_training.data.garments.catalog import vocabulary
from dqe_training.model import DQEModel
from dqe_training.tokenizer import build_tokenizer

_ROOT = Path(__file__).parent
_PACKAGES = ("torch", "transformers", "onnx", "onnxruntime")
# Sizes of the published checkpoints (docs/backbones.md).
TOWERS = {
    "vit-g": VisionConfig(hidden_size=1408, layers=39, heads=16, mlp_size=6144, patch_size=14),
    "vit-l": VisionConfig(hidden_size=1024, layers=23, heads=16, mlp_size=4096, patch_size=14),
}
QFORMER = QFormerConfig(
    hidden_size=768, layers=12, heads=12, mlp_size=3072, query_tokens=32, embedding_dim=256, cross_attention_frequency=2, vocab_size=30_523,
    position_embeddings=512,
)  # fmt: skip


def write_random_checkpoint(path: Path, tower: str, base_query: BaseQuery = "mean", blocks: int = 0) -> Path:
    """A checkpoint as training writes it, of the full size; its tower has `blocks` blocks, 0: all."""
    torch.manual_seed(0)
    vision = msgspec.structs.replace(TOWERS[tower], layers=blocks or TOWERS[tower].layers)
    model_config = ModelConfig(preprocessing=PreprocessingSpec(image_size=224), vision=vision, qformer=QFORMER, base_query=base_query)
    config = TrainConfig(model=model_config)
    texts = [word for attribute in vocabulary().attributes for word in attribute.words]
    tokenizer = build_tokenizer(texts)
    model = DQEModel(config.model, vocabulary(), tokenizer.get_vocab_size())
    save_checkpoint(path, model, tokenizer, config=config, progress=Progress(finished=True))
    return path


def export(checkpoint: Path, out: Path, precision: str) -> dict[str, Any]:
    """Run dqe-export; seconds and peak memory of its process, and its report."""
    command = [str(Path(sys.executable).parent / "dqe-export"), str(checkpoint), str(out), "--precision", precision, "--force"]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=sys.stderr)
    _, status, usage = os.wait4(process.pid, 0)
    code = os.waitstatus_to_exitcode(status)
    if code:
        raise subprocess.CalledProcessError(code, command)
    return {
        "precision": precision, "seconds": time.perf_counter() - started, "peak_bytes": usage.ru_maxrss * 1024,
        "report": json.loads((out / "report.json").read_bytes()),
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="export_full_size", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tower", choices=TOWERS, default="vit-g")
    parser.add_argument("--base-query", choices=get_args(BaseQuery), default="mean", help="how queries are made (default: mean)")
    parser.add_argument(
        "--blocks", type=int, default=0, help="blocks of the tower (default: all); fewer export faster, and a catalogue query runs none"
    )
    parser.add_argument("--precisions", default="f32,f16,int8", help="of f32, f16, int8 (default: all)")
    parser.add_argument("--work", type=Path, default=_ROOT.parent / "build" / "full-size", help="folder for checkpoint and bundles, 20 GB")
    parser.add_argument("--keep", action="store_true", help="keep the bundles, for benchmarks.query_full_size")
    parser.add_argument("--out", type=Path, default=_ROOT / "results" / machine.slug(), help="folder for results")
    options = parser.parse_args(arguments)
    name = options.tower if options.base_query == "mean" else f"{options.tower}-{options.base_query}"
    name += f"-{options.blocks}-blocks" if options.blocks else ""
    checkpoint = options.work / name
    if not checkpoint.exists():
        options.work.mkdir(parents=True, exist_ok=True)
        write_random_checkpoint(checkpoint, options.tower, options.base_query, options.blocks)
    rows = []
    path = options.out / "export.json"
    for precision in options.precisions.split(","):
        started, before = datetime.now(UTC), machine.load_average()
        bundle = options.work / f"{name}-{precision}"
        found = export(checkpoint, bundle, precision)
        if not options.keep:
            shutil.rmtree(bundle)
        record = report.load(path, "export")
        record["sections"][f"{name} {precision}"] = found | {
            "started": started.isoformat(timespec="seconds"), "load_before": before, "load_after": machine.load_average(),
            "machine": machine.describe(_PACKAGES),
        }  # fmt: skip
        report.save_json(path, record)
        for graph in found["report"]["graphs"]:
            medians = [(timed["pytorch"]["median"], timed["runtime"]["median"]) for timed in graph["latency"]]
            latencies = [f"{pytorch:,.1f} / {runtime:,.1f} = {pytorch / runtime:.2f} x" for pytorch, runtime in medians]
            share = f"{graph['size'] / graph['float32_size']:.3f}"
            rows.append([f"{precision} {graph['graph']}", f"{graph['size'] / 1e6:,.0f}", share, *latencies])
        rows.append([f"{precision}: {found['seconds']:,.0f} s, peak {report.size(found['peak_bytes'])}", "", "", "", ""])
    print(report.table(["graph", "MB", "of float32", "batch 1: PyTorch / runtime, ms", "batch 8"], rows))
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
