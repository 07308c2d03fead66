"""docs/published-models.md: its five commands run as they stand on a stand-in of the published layout, and so does training."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from support import published_models as files
from support.samples import noise_image
from support.tiny_benchmarks import write_cirr

from dqe_engine.bundle import Bundle
from dqe_engine.cli import index, search
from dqe_engine.contracts.vocabulary import PAPER_VOCABULARY
from dqe_export.cli import export, reproduce
from dqe_training.checkpointing.checkpoint import load_checkpoint
from dqe_training.checkpointing.meta import read_meta
from dqe_training.cli import import_, train

PAGE = Path(__file__).parents[2] / "docs" / "published-models.md"
MAINS: dict[str, Callable[[Sequence[str]], int]] = {
    "dqe-import": import_.main, "dqe-export": export.main, "dqe-index": index.main, "dqe-search": search.main, "dqe-train": train.main,
    "dqe-reproduce": reproduce.main,
}  # fmt: skip
STAND_IN = replace(files.VIT_L, depth=1, mlp=16, image=28, words=48, layers=1, qformer_mlp=16, positions=40, queries=2, joint=16)
"""ViT-L's width and the Q-Former's, so that no option has to say their heads; everything else as small as it can be."""


def commands() -> tuple[list[str], list[str], list[str]]:
    """The five of the page's first block, the one to train, and the one to a table."""
    blocks = re.findall(r"^```\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    first, training, table = ([line for line in block.splitlines() if line] for block in blocks)
    return first, training, table


@pytest.mark.slow
def test_the_five_commands_run_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bert").mkdir()
    (tmp_path / "photos").mkdir()
    files.save("sprc", tmp_path / "sprc_cirr_vitl.pt", STAND_IN, half_tower=True)
    files.write_vocabulary(tmp_path / "bert" / "vocab.txt", STAND_IN.words)
    for n in range(6):
        noise_image(n).save(tmp_path / "photos" / f"{n}.jpg")
    noise_image(2).save(tmp_path / "photo.jpg")
    five, (training,), (table,) = commands()
    assert [line.split()[0] for line in five] == ["dqe-import", "dqe-export", "dqe-index", "dqe-search", "dqe-serve"]
    for line in five[:4]:
        capsys.readouterr()
        name, *arguments = shlex.split(line)
        assert MAINS[name](arguments) == 0, line
    found = capsys.readouterr().out
    assert ".jpg" in found
    assert "this model has no attributes to weigh" in found
    manifest = Bundle.load(Path("bundle")).manifest
    assert manifest.imported is not None
    assert manifest.sizes.attributes == 0
    assert (manifest.imported.format, manifest.imported.files[0].name) == ("sprc", "sprc_cirr_vitl.pt")
    assert (manifest.preprocessing.fit, manifest.tokenizer.captions, manifest.tokenizer.max_length) == ("target_pad_crop", "blip", 32)
    assert manifest.tokenizer == read_meta(Path("model")).tokenizer
    serve(five[4])
    lines = [{"reference": f"{n}.jpg", "target": f"{(n + 1) % 6}.jpg", "text": "Is RED!"} for n in range(6)]
    Path("mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    name, *arguments = shlex.split(training)
    assert MAINS[name]([*arguments, "optim.epochs=1", "optim.batch_size=2"]) == 0
    trained = read_meta(Path("runs/mine/model"))
    assert trained.imported == manifest.imported
    assert trained.tokenizer.captions == "blip"
    assert trained.config.model.attribute_weights
    assert load_checkpoint(Path("runs/mine/model")).vocabulary == PAPER_VOCABULARY
    write_cirr(tmp_path / "cirr")
    capsys.readouterr()
    name, *arguments = shlex.split(table)
    assert MAINS[name]([*arguments, "--rows", "pytorch"]) == 0
    assert "| SPRC, ViT-L [2], published: test1" in capsys.readouterr().out


def serve(line: str) -> None:
    """The page's command with a free port; the page is there, and the process ends when it is told to."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    program = "from dqe_engine.cli.serve import main; raise SystemExit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", program, *shlex.split(line)[1:], "--port", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5) as answer:
                    assert b"<html" in answer.read()
                    return
            except OSError:
                assert process.poll() is None, process.stderr.read() if process.stderr else ""
                assert time.monotonic() < deadline, "no answer within a minute"
                time.sleep(0.2)
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
