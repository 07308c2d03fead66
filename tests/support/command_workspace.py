"""A folder in which every command has something to read, their arguments there, and what an error looks like."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import published_models
from support.mining_workers import problem
from support.samples import noise_image
from support.tiny_benchmarks import write_cirr, write_fashioniq
from support.tiny_blip2 import write_blip2
from support.tiny_bundle import build_tiny_bundle, build_tiny_heads
from support.tiny_training import OVERRIDES, write_checkpoint, write_tiny_garments

from dqe_engine.cli import index, mine
from dqe_training.cli import data, evaluate, pretrain

Main = Callable[[Sequence[str]], int]

INDEX = "bundle images --out index --provider cpu --threads 1"
SEARCH = "bundle index --image images/00.png --text red --provider cpu --threads 1"
EVAL = "model --data garments"
EVAL_OWN = "model --triplets own/triplets.jsonl --images own/images --image-labels own/labels.jsonl --gallery own/gallery.txt"
EVAL_PUBLIC = "model --data fashioniq"
EVAL_BUNDLE = "bundle --data garments"
TRAIN = "--data garments --out OUT OVERRIDES"
OWN = (
    "--triplets own/triplets.jsonl --images own/images --image-labels own/labels.jsonl --vocabulary own/vocabulary.json --out OUT OVERRIDES"
)
START = "--triplets own/triplets.jsonl --images own/images --out OUT start=model finetune=attributes"
BACKBONE = "--triplets own/triplets.jsonl --images own/images --out OUT backbone=blip2 optim.epochs=1"
TOWER = "--data garments --out OUT OVERRIDES vision_weights=tower optim.vision_learning_rate=0"
MINE = "mining --out OUT"
ENCODE = "encode model --data garments --out OUT"
FEATURES = "features --model model --images images --out"
CHECKED = "fashioniq/captions/cap.dress.val.json fashioniq/image_splits/split.dress.val.json"
SUBMISSION = "submission/cirr-test1-recall.json"
PRETRAIN = "garments --out OUT --config config.yaml"
ABLATE = "--data garments --out OUT --seeds 1 --variants baseline,+kl OVERRIDES"
EXPORT = "model OUT --data garments"
IMPORT = "published.pth OUT --tokenizer vocab.txt --vision-heads 4 --qformer-heads 2"
REPRODUCE = "cirr --weights published.pth --images cirr --out OUT --tokenizer vocab.txt --vision-heads 4 --qformer-heads 2"
IMPORT_TOWER = IMPORT.replace("published.pth", "qformer.pth --tower tower.pth")
_PATIENCE = 60
_WATCHDOG = """if True:
    import os, sys, time
    time.sleep(float(sys.argv[2]))
    while True:
        try:
            os.close(os.open(sys.argv[1], os.O_WRONLY | os.O_NONBLOCK))  # who reads it comes to its end; where nobody does, an error
            print("waited for", flush=True)
        except OSError:
            time.sleep(0.1)
"""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("workspace")
    (root / "images").mkdir()
    for seed in range(3):
        noise_image(seed).save(root / "images" / f"{seed:02}.png")
    build_tiny_bundle(root / "bundle")
    build_tiny_heads(root / "heads")
    write_tiny_garments(root / "garments")
    write_checkpoint(root / "model")
    write_blip2(root / "blip2", shard_size="10MB")
    write_fashioniq(root / "fashioniq")
    write_cirr(root / "cirr")
    (root / "own").mkdir()
    shutil.copytree(root / "garments" / "images" / "train", root / "own" / "images")
    names = sorted(path.name for path in (root / "own" / "images").iterdir())
    lines = [{"reference": a, "target": b, "text": "is red"} for a, b in pairwise(names[:12])]
    (root / "own" / "triplets.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (root / "own" / "labels.jsonl").write_text("".join(json.dumps({"image": n, "attributes": {"colour": "red"}}) + "\n" for n in names))
    (root / "own" / "gallery.txt").write_text("\n".join(names))
    (root / "own" / "vocabulary.json").write_text('{"attributes": [{"name": "colour", "values": ["red"]}]}')
    (root / "config.yaml").write_text("model: {preprocessing: {image_size: 16}, vision: {hidden_size: 16, layers: 1, heads: 2}}")
    (root / "traffic.jsonl").write_text('{"batch": 4, "text_length": 11}\n' * 9)
    Image.new("L", (840, 840)).save(root / "sprite.png")
    state = published_models.save("lavis", root / "published.pth", published_models.TINY["clip"])
    prefix = "visual_encoder."
    torch.save({"model": {name: value for name, value in state.items() if not name.startswith(prefix)}}, root / "qformer.pth")
    torch.save({name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}, root / "tower.pth")
    published_models.write_vocabulary(root / "vocab.txt", published_models.TINY["clip"].words)
    (root / "mining").mkdir()
    for name, array in zip(("queries", "gallery", "targets", "exclude"), problem().values(), strict=True):
        np.save(root / "mining" / f"{name}.npy", array)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr(torch.cuda, "is_available", lambda: False)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        assert index.main(INDEX.split()) == 0
        assert mine.main(["mining", "--out", "mined"]) == 0
        assert pretrain.main(["garments", "--out", "tower", "--config", "config.yaml", "--epochs", "1"]) == 0
        assert data.main(["features", "--model", "model", "--images", "images", "--out", "features"]) == 0
        assert evaluate.main(["model", "--data", "cirr", "--split", "test1", "--submission", "submission"]) == 0
        yield root
        torch.set_num_threads(threads)


def expanded(arguments: str, out: Path) -> list[str]:
    return arguments.replace("OVERRIDES", " ".join(OVERRIDES)).replace("OUT", str(out)).split()


def check_line(code: int, said: str, part: str) -> None:
    """One `error:` line at the end, which holds `part`; where that is about permissions, another file is no remedy."""
    assert code == 2, said
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, said
    assert said.splitlines()[-1] == errors[0]
    assert part in errors[0]
    if "ermission" in part:
        for remedy in ("index again", "copy it again", "export again", "damaged", "truncated"):
            assert remedy not in errors[0]


@contextmanager
def pipe_at(path: Path) -> Iterator[None]:
    """A pipe that nobody writes to. Whoever waits for it is set free after a while, by another process, and fails the block."""
    os.mkfifo(path)
    command = [sys.executable, "-S", "-c", _WATCHDOG, str(path), str(_PATIENCE)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watchdog:
        try:
            yield
        finally:
            watchdog.kill()
            told, _ = watchdog.communicate()
    assert not told, f"{path}: a pipe was waited for"
