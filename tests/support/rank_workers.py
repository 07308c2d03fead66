"""What the ranks of tests/training/test_distributed.py do."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from safetensors.torch import save_file
from support.ranks import RankTask
from support.tiny_training import load_tiny, make_model
from torch import nn

from dqe_engine.cli.main import run as exit_code_of
from dqe_engine.contracts.parsing import to_json
from dqe_engine.contracts.zones import Bounds, ZoneSpec
from dqe_training.config import TrainConfig
from dqe_training.data.garments.catalog import vocabulary
from dqe_training.data.triplets import TextBatcher
from dqe_training.distributed import World, joined_world
from dqe_training.encoding import TrainingImages
from dqe_training.model.adapters import prepare_finetuning
from dqe_training.model.prompts import PromptTokens
from dqe_training.run.optim import build_optimizer
from dqe_training.run.step import Batch, TrainingStep
from dqe_training.run.trainer import Trainer
from dqe_training.run.workflow import build_model, make_tokenizer
from dqe_training.tokenizer import build_tokenizer
from dqe_training.trns.refreshing import mine_shared

SHARE = 0.3  # of the relevance distribution, so that target similarities matter


def config_of(text: str) -> TrainConfig:
    return msgspec.json.decode(text, type=TrainConfig)


def batch_gradients(data: str, config: TrainConfig, *, negatives: bool, world: World, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """The gradients of one batch by parameter name, those that are there, with `loss.<part>` and the queries. `scale` is that
    of float16 gradients, which are returned without it."""
    triplets, pixels, _ = load_tiny(Path(data))
    tokenizer = build_tokenizer(triplets.texts)
    model = make_model(config.model, vocab_size=tokenizer.get_vocab_size()).train(not config.encoder_frozen)
    prepare_finetuning(model, config)
    model.checkpoint_activations = config.optim.checkpoint_activations
    frozen = config.optim.vision_learning_rate == 0
    images = TrainingImages(model, pixels, None, frozen=frozen, encoder_frozen=config.encoder_frozen, world=world)
    images.prepare(lambda event: None)
    texts = TextBatcher(tokenizer, triplets.training_texts, max_length=32, captions="plain")
    prompts = PromptTokens(model, seed=0) if config.prompted else None
    optimizer = build_optimizer(model, config.optim, prompts, temperature=config.loss.temperature)
    step = TrainingStep(model, optimizer, config, triplets, texts, images, world, prompts=prompts)
    step.restore(step.state() | ({"scaler": torch.tensor([scale, 0.0], dtype=torch.float64)} if config.optim.autocast == "f16" else {}))
    rng = np.random.default_rng(0)
    rows = rng.permutation(len(triplets))[: config.optim.batch_size]
    negative = rng.integers(-1, len(triplets.images), len(rows)) if negatives else None
    torch.manual_seed(5 + world.rank)
    queries, parts = step.gradients(Batch(0, rows, rows, triplets.named[rows], negative), relevance_share=SHARE)
    parameters = {**dict(model.named_parameters()), **({} if prompts is None else {"prompts": prompts.tokens})}
    found = {name: p.grad / scale for name, p in parameters.items() if p.grad is not None}
    return found | {f"loss.{name}": value for name, value in parts.items()} | {"queries": queries.detach()}


def largest_difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Of what `batch_gradients` gives, relative to the largest value of each tensor. The keys' biases are held to zero instead:
    a softmax does not see them, so their gradient is nothing but rounding."""
    assert found.keys() == expected.keys()  # what has no gradient in one has none in the other
    differences = [0.0]
    for name, value in expected.items():
        if name.endswith("key.bias"):
            assert max(float(value.abs().max()), float(found[name].abs().max())) < 1e-6, name
        else:
            differences.append(float((found[name] - value).abs().max() / value.abs().max().clamp_min(1e-12)))
    return max(differences)


def gradients(data: str, config: str, negatives: bool, out: str) -> None:
    with joined_world(timeout=60) as world:
        found = batch_gradients(data, config_of(config), negatives=negatives, world=world)
        save_file({name: value.contiguous() for name, value in found.items()}, f"{out}/rank-{world.rank}.safetensors")


def sums(out: str) -> None:
    """Gradients that some ranks lack: all have the first, only rank 1 the second, nobody the third; the last needs none."""
    with joined_world(timeout=60) as world:
        parameters = [nn.Parameter(torch.zeros(3, 2)) for _ in range(4)]
        parameters[3].requires_grad_(False)
        parameters[0].grad = torch.full((3, 2), 1.0 + world.rank)
        if world.rank == 1:
            parameters[1].grad = torch.full((3, 2), 5.0)
        world.sum_gradients(parameters)
        assert parameters[2].grad is None
        assert parameters[3].grad is None
        assert parameters[0].grad is not None
        assert parameters[1].grad is not None
        save_file({"both": parameters[0].grad.clone(), "one": parameters[1].grad.clone()}, f"{out}/rank-{world.rank}.safetensors")


def mine(data: str, out: str, block: int, bounds: Bounds) -> None:
    triplets, _, _ = load_tiny(Path(data))
    with joined_world(timeout=60) as world:
        queries, tokens = mining_arrays(len(triplets), len(triplets.images))
        zones = ZoneSpec(lo=0.05, hi=0.5, bounds=bounds, policy="softmax", seed=3)
        picks, applied = mine_shared(queries, tokens, triplets, zones=zones, picks=4, world=world, block=block)
        np.save(f"{out}/rank-{world.rank}.npy", picks)
        Path(f"{out}/rank-{world.rank}.json").write_bytes(to_json(applied))


def mining_arrays(queries: int, items: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(queries, 8)).astype(np.float32)
    return vectors, rng.normal(size=(items, 3, 8)).astype(np.float32)


def train(data: str, run: str, config: str, timeout: float = 60.0, stranger: int = -1, at: int = 0, rank: int = 0, number: int = 0) -> int:
    """What dqe-train does, with its exit codes; the final weights go to `final-<rank>.safetensors`. The rank `stranger` has
    other images. After step `at`, `rank` gets the signal `number`. The job's folder is `run`."""
    triplets, pixels, _ = load_tiny(Path(data))
    settings = config_of(config)

    def listen(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == at:
            os.kill(int(Path(run, f"rank-{rank}.pid").read_text()), number)

    def work() -> int:
        with joined_world(timeout=timeout) as world:
            tokenizer = make_tokenizer(settings, triplets.texts)
            model = build_model(settings, vocabulary(), tokenizer.get_vocab_size())
            shown = 255 - pixels if world.rank == stranger else pixels
            trainer = Trainer(model, tokenizer, settings, triplets, shown, Path(run), world=world, listener=listen)
            state = trainer.train().state_dict()
        save_file({name: value.contiguous() for name, value in state.items()}, f"{run}/final-{world.rank}.safetensors")
        return 0

    return exit_code_of(work)


TASKS: dict[str, RankTask] = {"gradients": gradients, "sums": sums, "mine": mine, "train": train}
