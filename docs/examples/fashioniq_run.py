"""A researcher's run on FashionIQ: check the copy, train, export, and judge the checkpoint and the bundle by the dataset's own protocol.

python fashioniq_run.py OUT --data fashioniq backbone=Salesforce/blip2-itm-vit-g
python fashioniq_run.py OUT --stand-in    # a few coloured squares in FashionIQ's layout, and a tiny model: every step in a minute

Run the same command again after an interruption: training resumes, and what is finished is kept.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path

from PIL import Image

from dqe_export.cli import export
from dqe_training.cli import data, evaluate, train

COLOURS = {"red": (200, 30, 30), "green": (30, 140, 60), "blue": (40, 60, 200), "yellow": (230, 210, 40), "black": (20, 20, 20)}
TINY = [
    "model.preprocessing.image_size=32", "model.vision.hidden_size=32", "model.vision.layers=1", "model.vision.heads=2",
    "model.qformer.hidden_size=32", "model.qformer.layers=1", "model.qformer.heads=2", "model.qformer.query_tokens=4",
    "model.qformer.embedding_dim=16", "optim.batch_size=8", "optim.epochs=2", "vision_weights=", "optim.vision_learning_rate=1e-3",
]  # fmt: skip
"""Settings of the stand-in's model, trained from scratch."""


def write_stand_in(folder: Path) -> Path:
    """A folder laid out as FashionIQ: per category and split, captions of triplets and the list of images."""
    for folder_name in ("captions", "image_splits", "images"):
        (folder / folder_name).mkdir(parents=True, exist_ok=True)
    for category in ("dress", "shirt", "toptee"):
        for split, first in (("train", 0), ("val", 50)):
            ids = {colour: f"{category}{first + n:04}" for n, colour in enumerate(COLOURS)}
            for colour, id in ids.items():
                Image.new("RGB", (40, 60), COLOURS[colour]).save(folder / "images" / f"{id}.png")
            triplets = [
                {"candidate": ids[a], "target": ids[b], "captions": [f"is {b}", f"has a {b} colour"]} for a in ids for b in ids if a != b
            ]
            (folder / "captions" / f"cap.{category}.{split}.json").write_text(json.dumps(triplets))
            (folder / "image_splits" / f"split.{category}.{split}.json").write_text(json.dumps([*ids.values()]))
    return folder


def figures(model: Path, dataset: Path) -> dict[str, float]:
    """Recall@10 by category, and the mean of R@10 and R@50 over all, of a checkpoint or of a bundle: the same queries, the same code."""
    written = io.StringIO()
    with redirect_stdout(written):
        _run(evaluate.main, [str(model), "--data", str(dataset), "--json"])
    report = json.loads(written.getvalue())
    return {f"{part['name']} R@10": part["figures"]["recall_at_10"] for part in report["sets"]} | {"mean": report["summary"]["mean"]}


def run(out: Path, dataset: Path, settings: Sequence[str]) -> dict[str, dict[str, float]]:
    """Figures by what computed them."""
    _run(data.main, ["check", str(dataset)])
    _run(train.main, ["--data", str(dataset), "--out", str(out / "run"), *settings])
    model, bundle = out / "run" / "model", out / "bundle"
    if not bundle.exists():
        _run(export.main, [str(model), str(bundle)])
    return {"PyTorch": figures(model, dataset), "the runtime": figures(bundle, dataset)}


def _run(command: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> None:
    code = command(arguments)
    if code:
        raise SystemExit(code)  # it has said why


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", type=Path, metavar="FASHIONIQ")
    source.add_argument("--stand-in", action="store_true")
    parser.add_argument("settings", nargs="*", metavar="section.key=value", help="for dqe-train")
    args = parser.parse_intermixed_args()  # settings may come last
    if args.stand_in:
        dataset, settings = write_stand_in(args.out / "fashioniq"), ["--config", "own-data", *TINY, *args.settings]
    else:
        dataset, settings = args.data, args.settings
    for name, found in run(args.out, dataset, settings).items():
        print(f"{name}: " + ", ".join(f"{figure} {100 * value:.2f}" for figure, value in found.items()))


if __name__ == "__main__":
    main()
