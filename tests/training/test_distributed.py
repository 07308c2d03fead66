"""Two ranks on a CPU (gloo): the gradients of one process, the same negatives, exact resume, and no rank left hanging."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support import published_models
from support.fork_server import ForkServer
from support.rank_workers import batch_gradients, largest_difference, mining_arrays
from support.ranks import Ranks, error_lines, errors_of, wait_until
from support.tiny_training import IMAGE_SIZE, OVERRIDES, heads_alone, model_config, train_config, write_checkpoint

from dqe_engine.contracts.parsing import parse_json, to_json
from dqe_engine.contracts.zones import Bounds, ZoneSpec
from dqe_engine.errors import InputError
from dqe_engine.zones import mine_negatives
from dqe_training.checkpointing.checkpoint import latest_checkpoint, load_checkpoint
from dqe_training.config import LossConfig, TrainConfig
from dqe_training.data.triplets import TripletData
from dqe_training.distributed import Ranks as DistributedRanks
from dqe_training.distributed import World, joined_world
from dqe_training.importing import ImportOptions, import_model
from dqe_training.run.configuration import load_config
from dqe_training.trns.refreshing import mine_shared

Tiny = tuple[TripletData, np.ndarray]
STEPS = 15
EPOCHS = 20  # of five steps: enough to be interrupted before the end


@pytest.fixture(scope="module")
def ranks(torch_workers: ForkServer) -> Ranks:
    return Ranks(torch_workers)


def as_json(config: TrainConfig) -> str:
    return msgspec.json.encode(config).decode()


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


# -- gradients -------------------------------------------------------------------------------------------------------------

SPRC = train_config(
    model_config(base_query="two_pass", position_embeddings=40),
    loss=LossConfig(objective="infonce", prompt_weight=0.7, align_weight=0.5, filter="absolute", filter_margin=0.1),
)
GRADIENTS = {
    "frozen": (train_config(), False),
    "negatives": (train_config(), True),
    "chunks": (train_config(cached_chunk=3), True),
    "vision": (train_config(vision_learning_rate=1e-4), True),
    "infonce": (train_config(model_config(attribute_weights=False), loss=LossConfig(objective="infonce")), False),
    "activations": (train_config(cached_chunk=2, checkpoint_activations=True), True),
    "two_pass": (train_config(model_config(base_query="two_pass", attribute_weights=False), cached_chunk=3), True),
    "two_encoders": (train_config(model_config(base_query="two_encoders", attribute_weights=False)), True),
    "zero_shot": (train_config(model_config(base_query="zero_shot", attribute_weights=False), cached_chunk=3), True),
    "sprc": (SPRC, False),
    "sprc-chunks": (msgspec.structs.replace(SPRC, optim=msgspec.structs.replace(SPRC.optim, cached_chunk=3)), False),
    "pairwise": (
        msgspec.structs.replace(
            train_config(), loss=LossConfig(objective="pairwise"), trns=msgspec.structs.replace(train_config().trns, warmup="random")
        ),
        True,
    ),
    "filter": (train_config(loss=LossConfig(filter="relative", filter_margin=0.05)), True),
    "attributes": (heads_alone(), True),
    "attributes-chunks": (heads_alone(cached_chunk=3), True),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_are_those_of_one_process(name: str, ranks: Ranks, garments: Path, tmp_path: Path) -> None:
    config, negatives = GRADIENTS[name]
    whole = msgspec.structs.replace(config, optim=msgspec.structs.replace(config.optim, cached_chunk=0, checkpoint_activations=False))
    expected = batch_gradients(str(garments), whole, negatives=negatives, world=World())
    arguments: dict[str, Any] = {"data": str(garments), "config": as_json(config), "negatives": negatives, "out": str(tmp_path)}
    assert ranks.run(tmp_path, "gradients", **arguments) == [0, 0], errors_of(tmp_path)
    found = [load_file(tmp_path / f"rank-{rank}.safetensors") for rank in (0, 1)]
    assert ("loss.rank" in expected) == negatives
    assert_same(*found)
    assert largest_difference(found[0], expected) <= 1e-5


def test_a_gradient_that_only_some_ranks_have(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks.run(tmp_path, "sums", out=str(tmp_path)) == [0, 0], errors_of(tmp_path)
    for rank in (0, 1):
        found = load_file(tmp_path / f"rank-{rank}.safetensors")
        assert torch.equal(found["both"], torch.full((3, 2), 3.0))
        assert torch.equal(found["one"], torch.full((3, 2), 5.0))


# -- sharing work ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize(("count", "step"), [(0, 1), (1, 4), (19, 4), (64, 16), (111, 1), (5, 100)])
def test_ranks_cut_work_where_one_process_does(size: int, count: int, step: int) -> None:
    bounds = World(size=size).bounds(count, step)
    assert (bounds[0], bounds[-1], len(bounds)) == (0, count, size + 1)
    assert bounds == sorted(bounds)
    assert all(position % step == 0 for position in bounds[:-1] if position < count)
    rows = [row for rank in range(size) for row in World(rank=rank, size=size).rows(count, step)]
    assert rows == list(range(count))


@pytest.mark.parametrize("block", [8, 16, 1024])  # five blocks, three, and one, with nothing for the other rank to do
@pytest.mark.parametrize("bounds", ["absolute", "pooled", "rank"])
def test_negatives_are_those_of_one_process(
    bounds: Bounds, block: int, ranks: Ranks, garments: Path, tiny_data: Tiny, tmp_path: Path
) -> None:
    data, _ = tiny_data
    assert ranks.run(tmp_path, "mine", data=str(garments), out=str(tmp_path), block=block, bounds=bounds) == [0, 0], errors_of(tmp_path)
    queries, tokens = mining_arrays(len(data), len(data.images))
    zones = ZoneSpec(lo=0.05, hi=0.5, bounds=bounds, policy="softmax", seed=3)
    expected = mine_negatives(queries, tokens, data.target, zones=zones, picks=4, exclude=data.reference[:, None], block=block)
    assert (expected.picks >= 0).mean() > 0.5
    for rank in (0, 1):
        np.testing.assert_array_equal(np.load(tmp_path / f"rank-{rank}.npy"), expected.picks)
        applied = parse_json(ZoneSpec, (tmp_path / f"rank-{rank}.json").read_bytes(), where="rank")
        if bounds == "rank":
            assert applied == zones
        else:
            assert (applied.bounds, applied.lo, applied.hi) == ("absolute", pytest.approx(expected.lo[0]), pytest.approx(expected.hi[0]))


def test_pooled_bounds_are_what_the_main_rank_says(tiny_data: Tiny) -> None:
    """Not what a rank finds itself, whose processor may add in another order."""

    class Told(World):
        def from_main(self, make: Callable[[], bytes]) -> bytes:
            return to_json(msgspec.structs.replace(parse_json(ZoneSpec, make(), where="main"), lo=0.5, hi=0.75))

    data, _ = tiny_data
    queries, tokens = mining_arrays(len(data), len(data.images))
    zones = ZoneSpec(lo=0.05, hi=0.5, bounds="pooled", seed=3)
    picks, applied = mine_shared(queries, tokens, data, zones=zones, picks=4, world=Told())
    assert applied == ZoneSpec(lo=0.5, hi=0.75, seed=3)
    expected = mine_negatives(queries, tokens, data.target, zones=applied, picks=4, exclude=data.reference[:, None])
    np.testing.assert_array_equal(picks, expected.picks)


# -- whole trainings -------------------------------------------------------------------------------------------------------


def losses_of(run: Path) -> list[dict[str, float]]:
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [event for event in events if event["event"] == "step"]
    return [{k: v for k, v in event.items() if k.startswith("loss/") or k in ("step", "learning_rate")} for event in steps]


def finals(run: Path) -> list[dict[str, torch.Tensor]]:
    return [load_file(run / f"final-{rank}.safetensors") for rank in (0, 1)]


DROPOUT = train_config(model_config(dropout=0.1))


@pytest.fixture(scope="module")
def straight(ranks: Ranks, garments: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of two ranks, with dropout."""
    run = tmp_path_factory.mktemp("straight")
    assert ranks.run(run, "train", data=str(garments), run=str(run), config=as_json(DROPOUT)) == [0, 0], errors_of(run)
    return run


def test_two_ranks_train_as_one_process(ranks: Ranks, garments: Path, tmp_path: Path) -> None:
    arguments = {"data": str(garments), "config": as_json(train_config())}
    for size in (1, 2):
        run = tmp_path / str(size)
        assert ranks.run(run, "train", size=size, run=str(run), **arguments) == [0] * size, errors_of(run, size)
    one, two = losses_of(tmp_path / "1"), losses_of(tmp_path / "2")
    assert [e["step"] for e in two] == list(range(1, STEPS + 1))
    assert "loss/rank" in two[-1]
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        np.testing.assert_allclose(list(b.values()), list(a.values()), rtol=0, atol=2e-4)
    assert_same(*finals(tmp_path / "2"))


def test_two_ranks_fine_tune_an_imported_model_as_one_process(ranks: Ranks, garments: Path, tmp_path: Path) -> None:
    """LoRA on a file of SPRC's layout, which brings no attribute heads. Its dropout is off, since ranks draw their own."""
    size = replace(published_models.TINY["clip"], image=IMAGE_SIZE, patch=8, words=1100)
    published_models.save("sprc", tmp_path / "sprc.pt", size)
    words = published_models.write_vocabulary(tmp_path / "vocab.txt", size.words)
    import_model(tmp_path / "sprc.pt", tmp_path / "model", ImportOptions(tokenizer=str(words), vision_heads=4, qformer_heads=2))
    given = [f"start={tmp_path / 'model'}", "finetune=lora", "model.attribute_weights=true", "model.qformer.dropout=0", "optim.epochs=1"]
    config = load_config("start", [*given, "optim.batch_size=8", "optim.log_every=1"])
    assert config.model.base_query == "two_pass"
    for ranked in (1, 2):
        run = tmp_path / str(ranked)
        arguments = {"data": str(garments), "run": str(run), "config": as_json(config)}
        assert ranks.run(run, "train", size=ranked, **arguments) == [0] * ranked, errors_of(run, ranked)
    one, two = losses_of(tmp_path / "1"), losses_of(tmp_path / "2")
    assert len(two) == 5
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(list(b.values()), list(a.values()), rtol=0, atol=2e-4)
    assert_same(*finals(tmp_path / "2"))
    before, after = load_checkpoint(tmp_path / "model").model.state_dict(), finals(tmp_path / "2")[0]
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert "qformer.encoder.layer.0.attention.attention.query.weight" in moved
    assert not [name for name in moved if name.startswith("vision_model.")]


def test_two_ranks_train_the_heads_alone(ranks: Ranks, garments: Path, tmp_path: Path) -> None:
    """One process writes what two resume; the encoder stays that of the checkpoint, to the bit, on both."""
    start, run = write_checkpoint(tmp_path / "model"), tmp_path / "run"
    arguments = {"data": str(garments), "run": str(run), "config": as_json(heads_alone(start=str(start)))}
    assert ranks.run(run, "train", size=1, at=6, rank=0, number=int(signal.SIGTERM), **arguments) == [130], errors_of(run, 1)
    assert ranks.run(run, "train", **arguments) == [0, 0], errors_of(run)
    assert_same(*finals(run))
    before, after = load_checkpoint(start).model.state_dict(), finals(run)[0]
    assert {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])} == {"attribute_heads"}


def test_dropout_differs_between_ranks_and_nothing_else(straight: Path) -> None:
    assert_same(*finals(straight))
    assert [p.name for p in sorted(straight.glob("step-*"))] == ["step-00000012", "step-00000015"]
    random = load_file(straight / "step-00000015" / "state.safetensors")["rng"]
    assert len(random) == 2
    assert not torch.equal(random[0], random[1])


@pytest.mark.parametrize(("number", "rank"), [(signal.SIGTERM, 1), (signal.SIGINT, 0), (signal.SIGTERM, 0)])
@pytest.mark.parametrize("step", [4, 10])  # between two checkpoints; at the end of an epoch
def test_a_signal_to_one_rank_ends_all_and_they_resume_exactly(
    step: int, number: signal.Signals, rank: int, ranks: Ranks, garments: Path, straight: Path, tmp_path: Path
) -> None:
    arguments = {"data": str(garments), "run": str(tmp_path), "config": as_json(DROPOUT)}
    assert ranks.run(tmp_path, "train", **arguments, at=step, rank=rank, number=number) == [130, 130], errors_of(tmp_path)
    stopped = losses_of(tmp_path)[-1]["step"]
    assert step <= stopped < STEPS
    assert max(tmp_path.glob("step-*")).name == f"step-{stopped:08d}"
    assert ranks.run(tmp_path, "train", **arguments) == [0, 0], errors_of(tmp_path)
    for a, b in zip(finals(tmp_path), finals(straight), strict=True):
        assert_same(a, b)
    assert losses_of(tmp_path) == losses_of(straight)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_other_and_they_resume_exactly(
    rank: int, ranks: Ranks, garments: Path, straight: Path, tmp_path: Path
) -> None:
    arguments = {"data": str(garments), "run": str(tmp_path), "config": as_json(DROPOUT)}
    codes = ranks.run(tmp_path, "train", **arguments, at=5, rank=rank, number=signal.SIGKILL)
    assert (codes[rank], codes[1 - rank]) == (-signal.SIGKILL, 2), errors_of(tmp_path)
    said = errors_of(tmp_path)[1 - rank]
    assert len(error_lines(said)) == 1, said
    assert f"rank {1 - rank} of 2: another rank has ended or does not answer" in said
    assert "Traceback" not in said
    assert ranks.run(tmp_path, "train", **arguments) == [0, 0], errors_of(tmp_path)
    assert_same(finals(tmp_path)[0], finals(straight)[0])
    assert losses_of(tmp_path) == losses_of(straight)


def test_a_rank_that_does_not_answer_is_not_waited_for_without_end(ranks: Ranks, garments: Path, tmp_path: Path) -> None:
    arguments = {"data": str(garments), "run": str(tmp_path), "config": as_json(DROPOUT), "timeout": 2.0}
    ranks.start(tmp_path, "train", **arguments, at=5, rank=1, number=signal.SIGSTOP)
    wait_until(lambda: error_lines(errors_of(tmp_path)[0]))
    ranks.signal(tmp_path, 1, signal.SIGKILL)
    assert ranks.wait(tmp_path) == [2, -signal.SIGKILL]
    assert "another rank has ended or does not answer" in errors_of(tmp_path)[0]


def test_more_ranks_go_on_with_what_one_process_began(ranks: Ranks, garments: Path, tmp_path: Path) -> None:
    """Without dropout, nothing but rounding depends on how many there are."""
    one, two = tmp_path / "one", tmp_path / "two"
    arguments = {"data": str(garments), "config": as_json(train_config())}
    assert ranks.run(one, "train", size=1, run=str(one), **arguments) == [0]
    assert ranks.run(two, "train", size=1, run=str(two), **arguments, at=7, number=signal.SIGTERM) == [130]
    assert losses_of(two) == losses_of(one)[:7]
    assert ranks.run(two, "train", run=str(two), **arguments) == [0, 0], errors_of(two)
    for a, b in zip(losses_of(one), losses_of(two), strict=True):
        np.testing.assert_allclose(list(b.values()), list(a.values()), rtol=0, atol=2e-4)


@pytest.mark.slow
def test_torchrun_starts_the_command(garments: Path, tmp_path: Path) -> None:
    """The whole way: torchrun, the command line, two ranks, one model that loads; Ctrl-C, and on to the end."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "dqe_training.cli.train"]
    command += ["--data", str(garments), "--out", str(tmp_path / "run"), *OVERRIDES, f"optim.epochs={EPOCHS}", "optim.log_every=1"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        wait_until(lambda: process.poll() is not None or ((tmp_path / "run" / "metrics.jsonl").is_file() and losses_of(tmp_path / "run")))
        process.send_signal(signal.SIGINT)
        said = process.communicate()[1]
    assert said.count("interrupted") == 2, said  # perhaps behind what was left of a progress bar
    assert latest_checkpoint(tmp_path / "run") is not None
    done = len(losses_of(tmp_path / "run"))
    assert done < 5 * EPOCHS
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout.splitlines()[-1:]) == (0, [str(tmp_path / "run" / "model")]), ended.stderr
    progress = load_checkpoint(tmp_path / "run" / "model").meta.progress
    assert progress.step == 5 * EPOCHS
    assert progress.best is not None, "validated every epoch by the main rank"
    assert load_checkpoint(tmp_path / "run" / "best").meta.progress.step == progress.best.step
    assert [e["step"] for e in losses_of(tmp_path / "run")] == list(range(1, 5 * EPOCHS + 1))


# -- mistakes --------------------------------------------------------------------------------------------------------------


def test_a_batch_that_ranks_cannot_share(ranks: Ranks, garments: Path, tmp_path: Path) -> None:
    arguments = {"data": str(garments), "run": str(tmp_path / "run"), "config": as_json(train_config(batch_size=9))}
    assert ranks.run(tmp_path, "train", **arguments) == [2, 2]
    assert "a batch of 9 triplets cannot be shared by 2 ranks; make optim.batch_size" in errors_of(tmp_path)[0]
    assert not (tmp_path / "run").exists()


def test_ranks_with_other_images_are_told(ranks: Ranks, garments: Path, tmp_path: Path) -> None:
    arguments = {"data": str(garments), "run": str(tmp_path), "config": as_json(DROPOUT), "stranger": 1}
    assert ranks.run(tmp_path, "train", **arguments) == [2, 2]
    for text in errors_of(tmp_path):
        assert "ranks have different configuration, triplets and images" in error_lines(text)[0]


def test_the_environment_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with joined_world() as world:
        assert (world, world.main) == (World(), True)
    monkeypatch.setenv("WORLD_SIZE", "1")
    with joined_world() as world:
        assert not isinstance(world, DistributedRanks)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="RANK is '' in the environment, expected a number; start with torchrun"), joined_world():
        pass
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(InputError, match="WORLD_SIZE is 'two'"), joined_world():
        pass
