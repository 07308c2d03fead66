"""Batches beyond memory: embeddings cached in chunks, activations computed again, half precision; the gradients stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.rank_workers import batch_gradients, largest_difference
from support.tiny_training import heads_alone, make_model, make_trainer, model_config, query_inputs, train_config
from torch import Tensor

from dqe_training.config import TrainConfig
from dqe_training.data.triplets import TripletData
from dqe_training.distributed import World
from dqe_training.run.step import TrainingStep

Tiny = tuple[TripletData, np.ndarray]


def gradients(garments: Path, config: TrainConfig, **options: Any) -> dict[str, Tensor]:
    return batch_gradients(str(garments), config, negatives=True, world=World(), **options)


class SavedActivations:
    """Bytes of activations that wait for a backward pass, and their peak."""

    def __init__(self) -> None:
        self.now = self.peak = 0

    def __enter__(self) -> SavedActivations:
        saved = self

        class Held:
            def __init__(self, tensor: Tensor) -> None:
                self.tensor, self.size = tensor, tensor.numel() * tensor.element_size()
                saved.now += self.size
                saved.peak = max(saved.peak, saved.now)

            def __del__(self) -> None:
                saved.now -= self.size

        self._hooks = torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)


# -- cached embeddings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 3, 7, 16, 99])  # of 16 triplets
@pytest.mark.parametrize("vision", [0.0, 1e-4])
def test_chunks_have_the_gradients_of_the_batch(chunk: int, vision: float, garments: Path) -> None:
    expected = gradients(garments, train_config(batch_size=16, vision_learning_rate=vision))
    found = gradients(garments, train_config(batch_size=16, vision_learning_rate=vision, cached_chunk=chunk))
    assert largest_difference(found, expected) <= 5e-6


@pytest.mark.parametrize("chunk", [3, 16])
def test_chunks_of_the_heads_alone(chunk: int, garments: Path) -> None:
    expected = gradients(garments, heads_alone(batch_size=16))
    assert largest_difference(gradients(garments, heads_alone(batch_size=16, cached_chunk=chunk)), expected) <= 5e-6


def test_chunks_draw_the_same_dropout_again(garments: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second pass would otherwise send the gradient through another network than the one whose loss it is of."""
    made: list[tuple[Tensor, ...]] = []
    states: list[Tensor] = []
    encode = TrainingStep._encode

    def spy(self: TrainingStep, *arguments: Any) -> tuple[Tensor, ...]:
        made.append(encode(self, *arguments))
        states.append(torch.get_rng_state())
        return made[-1]

    monkeypatch.setattr(TrainingStep, "_encode", spy)
    gradients(garments, train_config(model_config(dropout=0.2), batch_size=16, cached_chunk=4))
    assert len(made) == 8
    for first, second in zip(made[:4], made[4:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(states[0], states[1])
    assert torch.equal(states[7], states[3])  # the next step draws on from where the first pass had come to


def test_memory_is_that_of_a_chunk(garments: Path) -> None:
    peaks = {}
    for batch, chunk in [(8, 0), (32, 0), (8, 4), (32, 4)]:
        with SavedActivations() as saved:
            gradients(garments, train_config(batch_size=batch, cached_chunk=chunk))
        peaks[batch, chunk] = saved.peak
    assert peaks[32, 0] > 3 * peaks[8, 0]
    assert peaks[32, 4] < 0.5 * peaks[32, 0]
    assert peaks[32, 4] - peaks[8, 4] < 0.2 * (peaks[32, 0] - peaks[8, 0])  # what grows are the embeddings and their scores


# -- activations computed again --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_checkpointed_activations_change_nothing(dropout: float, garments: Path) -> None:
    model = model_config(dropout=dropout, layers=3)
    expected = gradients(garments, train_config(model))
    found = gradients(garments, train_config(model, checkpoint_activations=True))
    assert found.keys() == expected.keys()
    assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []


def test_checkpointed_activations_save_memory(garments: Path) -> None:
    peaks = []
    for checkpointed in (False, True):
        with SavedActivations() as saved:
            gradients(garments, train_config(model_config(layers=6), checkpoint_activations=checkpointed))
        peaks.append(saved.peak)
    assert peaks[1] < 0.6 * peaks[0]


def test_evaluation_knows_nothing_of_it() -> None:
    model = make_model()
    inputs = query_inputs(model, 3, 5)
    expected = model.encode_query(*inputs).query
    model.checkpoint_activations = True
    assert torch.equal(model.encode_query(*inputs).query, expected)


# -- half precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("autocast", "tolerance"), [("bf16", 0.1), ("f16", 0.02)])
def test_half_precision_gradients_are_near(autocast: str, tolerance: float, garments: Path) -> None:
    expected = gradients(garments, train_config(batch_size=16))
    found = gradients(garments, train_config(batch_size=16, autocast=autocast), scale=256.0 if autocast == "f16" else 1.0)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if name.startswith("loss.relevance/"):  # the shared mass, not a gradient; 0 where no target of the batch answers another row
            assert abs(float(found[name] - value)) <= 0.1, name
        elif not name.endswith("key.bias"):  # whose gradient is rounding alone
            assert float((found[name] - value).norm() / value.norm()) <= tolerance, name
    assert not torch.equal(found["queries"], expected["queries"])


@pytest.mark.parametrize("chunk", [0, 3])
def test_float16_resumes_exactly_with_its_scale(chunk: int, tiny_data: Tiny, tmp_path: Path) -> None:
    config = train_config(autocast="f16", cached_chunk=chunk, epochs=1, checkpoint_every=2)
    straight = make_trainer(config, *tiny_data, tmp_path / "straight")
    straight._step._scaler._growth_interval = 2  # so that the scale has moved when the run stops
    expected = straight.train().state_dict()

    class StopError(Exception):
        pass

    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 3:
            raise StopError

    stopped = make_trainer(config, *tiny_data, tmp_path / "run", listener=stop)
    stopped._step._scaler._growth_interval = 2
    with pytest.raises(StopError):
        stopped.train()
    saved = load_file(tmp_path / "run" / "step-00000002" / "state.safetensors")["scaler"].tolist()
    assert saved != [2.0**16, 0.0]  # not that of a new run
    resumed = make_trainer(config, *tiny_data, tmp_path / "run")
    resumed._step._scaler._growth_interval = 2
    found = resumed.train().state_dict()
    assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []
    scales = [trainer._step.state()["scaler"].tolist() for trainer in (straight, resumed)]
    assert scales[0] == scales[1]


def test_steps_whose_gradients_overflow_are_left_out(tiny_data: Tiny, tmp_path: Path) -> None:
    trainer = make_trainer(train_config(autocast="f16", epochs=1, learning_rate=1e-2), *tiny_data, tmp_path)
    start = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer._step.restore({"scaler": torch.tensor([2.0**120, 0.0], dtype=torch.float64)})
    trainer.train()
    assert trainer.progress.step == 5
    assert [name for name, value in trainer.model.state_dict().items() if not torch.equal(start[name], value)] == []
    assert trainer._step.state()["scaler"].tolist() == [2.0**115, 0.0]
