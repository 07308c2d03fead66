"""A pipe in the place of whatever a command of training or export is given: one line and exit code 2, and nobody waits for a writer."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import command_workspace
from support.command_workspace import (
    ABLATE,
    IMPORT,
    IMPORT_TOWER,
    OWN,
    PRETRAIN,
    REPRODUCE,
    TOWER,
    TRAIN,
    Main,
    check_line,
    expanded,
    pipe_at,
)

from dqe_engine.errors import ExportError
from dqe_engine.files import read_regular, sha256_of
from dqe_export.cli import demo, export, reproduce
from dqe_export.tensorrt.engines import named_cache
from dqe_training.ablation.results import others_code
from dqe_training.cli import ablate, data, evaluate, import_, pretrain, train

workspace = command_workspace.workspace
_COMMANDS = (train, evaluate, data, ablate, import_, pretrain, export, demo, reproduce)
MODULES = {module.__name__.rpartition(".")[2]: module for module in _COMMANDS}
READ = {
    "train --data": "--data PIPE --out OUT OVERRIDES",
    "train --triplets": OWN.replace("own/triplets.jsonl", "PIPE"),
    "train --images": OWN.replace("own/images", "PIPE"),
    "train --image-labels": OWN.replace("own/labels.jsonl", "PIPE"),
    "train --vocabulary": OWN.replace("own/vocabulary.json", "PIPE"),
    "train --val-triplets": f"{OWN} --val-triplets PIPE",
    "train --config": f"{TRAIN} --config PIPE",
    "train --features": f"{TOWER} --features PIPE",
    "train --out": TRAIN.replace("OUT", "PIPE"),
    "train start=": "--triplets own/triplets.jsonl --images own/images --out OUT start=PIPE",
    "train backbone=": "--triplets own/triplets.jsonl --images own/images --out OUT backbone=PIPE",
    "train vision_weights=": f"{TRAIN} vision_weights=PIPE",
    "evaluate model": "PIPE --data garments",
    "evaluate --data": "model --data PIPE",
    "evaluate --features": "model --data garments --features PIPE",
    "evaluate --triplets": "model --triplets PIPE --images own/images",
    "evaluate --images": "model --triplets own/triplets.jsonl --images PIPE",
    "evaluate --image-labels": "model --triplets own/triplets.jsonl --images own/images --image-labels PIPE",
    "evaluate --gallery": "model --triplets own/triplets.jsonl --images own/images --gallery PIPE",
    "evaluate --submission": "model --data cirr --split test1 --submission PIPE",
    "data garments out": "garments PIPE --train-images 2 --train-triplets 0 --gallery-images 2 --val-queries 0",
    "data tinted out": "tinted PIPE --sprite sprite.png",
    "data tinted --sprite": "tinted OUT --sprite PIPE",
    "data encode model": "encode PIPE --data garments --out OUT",
    "data encode --data": "encode model --data PIPE --out OUT",
    "data encode --triplets": "encode model --triplets PIPE --images own/images --out OUT",
    "data encode --images": "encode model --triplets own/triplets.jsonl --images PIPE --out OUT",
    "data encode --features": "encode model --data garments --out OUT --features PIPE",
    "data encode --out": "encode model --data garments --out PIPE",
    "data check data": "check PIPE",
    "data check --images": "check fashioniq --images PIPE",
    "data check-submission file": "check-submission PIPE --data cirr",
    "data check-submission --data": "check-submission submission/cirr-test1-recall.json --data PIPE",
    "data features --model": "features --model PIPE --images images --out OUT",
    "data features --backbone": "features --backbone PIPE --images images --out OUT",
    "data features --images": "features --model model --images PIPE --out OUT",
    "data features --out": "features --model model --images images --out PIPE",
    "ablate --data": ABLATE.replace("garments", "PIPE"),
    "ablate --images": "--data fashioniq --images PIPE --config own-data --out OUT --seeds 1 --variants baseline,+kl OVERRIDES",
    "ablate --config": f"{ABLATE} --config PIPE",
    "ablate --features": f"{ABLATE} --features PIPE vision_weights=tower optim.vision_learning_rate=0",
    "ablate --out": ABLATE.replace("OUT", "PIPE"),
    "ablate start=": f"{ABLATE} start=PIPE",
    "import_ source": IMPORT.replace("published.pth", "PIPE"),
    "import_ out": IMPORT.replace("OUT", "PIPE"),
    "import_ --tower": IMPORT_TOWER.replace("tower.pth", "PIPE"),
    "import_ --tokenizer": IMPORT.replace("vocab.txt", "PIPE"),
    "pretrain data": PRETRAIN.replace("garments", "PIPE"),
    "pretrain --config": PRETRAIN.replace("config.yaml", "PIPE"),
    "pretrain --out": PRETRAIN.replace("OUT", "PIPE"),
    "export checkpoint": "PIPE OUT",
    "export out": "model PIPE",
    "export --data": "model OUT --data PIPE",
    "export --bundle": "--trt --dry-run --bundle PIPE",
    "export --traffic": "--trt --dry-run --bundle bundle --traffic PIPE",
    "demo --out": "--out PIPE",
    "reproduce --weights": REPRODUCE.replace("published.pth", "PIPE"),
    "reproduce --images": REPRODUCE.replace("--images cirr", "--images PIPE"),
    "reproduce --annotations": f"{REPRODUCE} --annotations PIPE",
    "reproduce --against": f"{REPRODUCE} --against PIPE",
    "reproduce --out": REPRODUCE.replace("OUT", "PIPE"),
    "reproduce --tower": REPRODUCE.replace("published.pth", "qformer.pth --tower PIPE"),
    "reproduce --tokenizer": REPRODUCE.replace("vocab.txt", "PIPE"),
}
"""By option: arguments that give it a pipe, PIPE. Outputs and folders too: each is looked into before anything is written."""
ELSEWHERE = {
    "export --timing-cache": "read once there is a GPU to build for: test_a_timing_cache",
    "data check --missing-list": "written, not read",
    "data check --damaged-list": "written, not read",
}
UNTYPED = {"config", "gallery", "backbone", "tokenizer"}
"""Options that may be paths, and are strings to argparse."""


def options() -> Iterator[str]:
    """Every option and argument that takes a path, as a key of `READ`."""
    for command, module in MODULES.items():
        parsers = {command: module.build_parser()}
        for action in parsers[command]._actions:
            if isinstance(action, argparse._SubParsersAction):
                parsers = {f"{command} {name}": parser for name, parser in action.choices.items()}
        for name, parser in parsers.items():
            for action in parser._actions:
                if action.type is Path or action.dest in UNTYPED:
                    yield f"{name} {action.option_strings[-1] if action.option_strings else action.dest}"


def test_every_option_is_here() -> None:
    assert set(options()) == {name for name in READ if not name.endswith("=")} | ELSEWHERE.keys()


@pytest.mark.parametrize("option", READ)
def test_a_pipe_is_not_waited_for(option: str, workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main: Main = MODULES[option.split()[0]].main
    pipe = tmp_path / "pipe.yaml"
    with pipe_at(pipe):
        code = main([word.replace("PIPE", str(pipe)) for word in expanded(READ[option], tmp_path / "out")])
    check_line(code, capsys.readouterr().err, str(pipe))
    assert pipe.is_fifo(), "it was replaced"


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/full"])
def test_a_device_has_no_end(device: str) -> None:
    for read in (read_regular, sha256_of):
        with pytest.raises(OSError, match="not a regular file; give a copy of its content"):
            read(device)  # type: ignore[operator]


def test_a_timing_cache(tmp_path: Path) -> None:
    with pipe_at(tmp_path / "cache"), pytest.raises(ExportError, match="cache: not a regular file"):
        named_cache(tmp_path / "cache")


def test_a_cell_of_an_ablation(tmp_path: Path) -> None:
    (tmp_path / "cells").mkdir()
    with pipe_at(tmp_path / "cells" / "0.json"):
        assert others_code(tmp_path, []) == 1


def test_an_image_of_a_public_dataset(workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`dqe-data check` reads the images that are there, whatever they are, and counts those that are none."""
    image = workspace / "fashioniq" / "images" / "dress" / "Dva000.png"
    image.rename(tmp_path / "kept")
    try:
        with pipe_at(image):
            code = data.main(["check", "fashioniq"])
        image.unlink()
    finally:
        (tmp_path / "kept").rename(image)
    assert code == 1
    assert "not a regular file" in capsys.readouterr().out
