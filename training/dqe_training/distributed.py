"""Data-parallel training: what its processes, the ranks, tell each other.

One process is a `World` of its own, in which nothing is sent. Among several (`Ranks`), every rank computes the loss of the whole
batch from gathered embeddings and sends it back through the rows that it encoded itself; the sum of the ranks' parameter
gradients is then the gradient that one process would have.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dqe_engine.errors import BackendError, InputError
from dqe_engine.processors import available_cpus

RANK_TIMEOUT = 1800.0
"""Seconds that a rank waits for the others: longer than the slowest checkpoint is written."""
_BUCKET = 8 << 20  # gradient values summed in one message
_REMEDY = "start with torchrun, which sets RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT"


@dataclass(frozen=True)
class World:
    """One process. What it says of itself holds for `Ranks`, whose methods all of them call, in the same order."""

    rank: int = 0
    size: int = 1
    local_size: int = 1
    """Ranks on this machine, which share its processors and its memory."""

    @property
    def main(self) -> bool:
        """Whether this is the rank that writes files and shows progress."""
        return self.rank == 0

    @property
    def threads(self) -> int:
        """CPU threads for each rank of this machine, as the zone kernels take them: 0 means all."""
        return 0 if self.local_size == 1 else max(1, available_cpus() // self.local_size)

    def bounds(self, count: int, step: int = 1) -> list[int]:
        """`size` + 1 ascending positions from 0 to `count`: rank r works on rows bounds[r] to bounds[r + 1].

        Inner positions are multiples of `step`, so that ranks cut work where one process does: then a result is the same to the
        bit, whatever the number of ranks.
        """
        steps = -(-count // step)
        return [min(step * (steps * rank // self.size), count) for rank in range(self.size)] + [count]

    def rows(self, count: int, step: int = 1) -> range:
        """This rank's rows by `bounds`."""
        bounds = self.bounds(count, step)
        return range(bounds[self.rank], bounds[self.rank + 1])

    def gather(self, *rows: Tensor) -> tuple[Tensor, ...]:
        """Each (b, ...) of every rank, in the order of ranks: (size * b, ...). Gradients flow to this rank's rows alone."""
        return rows

    def complete(self, table: Tensor, step: int = 1) -> Tensor:
        """`table`, of which each rank has filled its `rows(len(table), step)`, with all rows on all ranks. In place."""
        return table

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Make every gradient the sum over the ranks. A parameter to which no rank has a gradient keeps none, so that the
        optimiser passes it over, as in one process; where only others have one, this rank counts as zero."""

    def maximum(self, *values: float) -> tuple[float, ...]:
        """The largest of each value over the ranks."""
        return values

    def from_main(self, make: Callable[[], bytes]) -> bytes:
        """What `make` returns on the main rank, which alone calls it."""
        return make()

    def agree(self, what: str, value: str) -> None:
        """Raise InputError on all ranks where `value`, which is `what` in the message, is not the same on all."""


class Ranks(World):
    """One of several processes. When another has ended, what it is asked for next is a BackendError of one line."""

    @contextmanager
    def _together(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise BackendError(
                f"rank {self.rank} of {self.size}: another rank has ended or does not answer ({' '.join(str(error).split())[:150]}); "
                "its own message says why; run the same command to resume from the last checkpoint"
            ) from error

    def gather(self, *rows: Tensor) -> tuple[Tensor, ...]:
        packed = torch.cat([part.flatten(1) for part in rows], dim=1)  # (b, K): one message instead of one per tensor
        parts = [torch.empty_like(packed) for _ in range(self.size)]
        with self._together():
            dist.all_gather(parts, packed.detach())
        parts[self.rank] = packed  # the only part with a graph behind it
        split = torch.cat(parts).split([part[0].numel() for part in rows], dim=1)
        return tuple(whole.reshape(len(whole), *part.shape[1:]) for whole, part in zip(split, rows, strict=True))

    def complete(self, table: Tensor, step: int = 1) -> Tensor:
        bounds = self.bounds(len(table), step)
        with self._together():
            for rank, (start, stop) in enumerate(pairwise(bounds)):
                if start < stop:
                    dist.broadcast(table[start:stop], src=rank)
        return table

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        trained = [p for p in parameters if p.requires_grad]
        wanted = self._any([p.grad is not None for p in trained])
        for bucket in _buckets([p for p, has in zip(trained, wanted, strict=True) if has]):
            flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in bucket])
            with self._together():
                dist.all_reduce(flat)
            for parameter, summed in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                parameter.grad = summed.view_as(parameter)

    def _any(self, flags: Sequence[bool]) -> list[bool]:
        """Whether any rank's flag is set, for each."""
        merged = torch.tensor(flags, dtype=torch.uint8)
        with self._together():
            dist.all_reduce(merged, op=dist.ReduceOp.MAX)
        return merged.bool().tolist()

    def maximum(self, *values: float) -> tuple[float, ...]:
        merged = torch.tensor(values, dtype=torch.float64)
        with self._together():
            dist.all_reduce(merged, op=dist.ReduceOp.MAX)
        return tuple(merged.tolist())

    def from_main(self, make: Callable[[], bytes]) -> bytes:
        content = make() if self.main else b""
        (length,) = self.maximum(len(content))
        if not length:
            return b""
        message = torch.frombuffer(bytearray(content or int(length)), dtype=torch.uint8)
        with self._together():
            dist.broadcast(message, src=0)
        return message.numpy().tobytes()

    def agree(self, what: str, value: str) -> None:
        main = self.from_main(value.encode)
        if any(self._any([value.encode() != main])):
            raise InputError(f"rank {self.rank} of {self.size}: ranks have different {what}; give all of them the same")


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Runs of parameters of about `_BUCKET` values, so that summing copies a part of the gradients at a time."""
    held: list[nn.Parameter] = []
    for parameter in parameters:
        held.append(parameter)
        if sum(p.numel() for p in held) >= _BUCKET:
            yield held
            held = []
    if held:
        yield held


@contextmanager
def joined_world(*, timeout: float = RANK_TIMEOUT) -> Iterator[World]:
    """The ranks that torchrun started this process as one of, by the environment variables that it sets; without them, or
    where it started one, a `World`. Tensors on the CPU go by gloo, those on a GPU by NCCL; each rank of a machine has its own.

    Raises InputError for an environment that is incomplete or names more ranks than this machine has GPUs, where it has any,
    BackendError when the ranks do not find each other within `timeout` seconds.
    """
    size = _read("WORLD_SIZE", 1)
    if size == 1:
        yield World()
        return
    rank, local_rank, local_size = (_read(name) for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    backend = "gloo"
    if torch.cuda.is_available():
        if local_size > (devices := torch.cuda.device_count()):
            raise InputError(f"{local_size} ranks on a machine with {devices} GPU(s): torchrun --nproc-per-node {devices} at most")
        torch.cuda.set_device(local_rank)
        backend = "cpu:gloo,cuda:nccl"
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    except (RuntimeError, ValueError) as error:  # ValueError: MASTER_ADDR or MASTER_PORT missing
        raise BackendError(f"rank {rank} of {size} cannot join the others ({' '.join(str(error).split())[:200]}); {_REMEDY}") from error
    yield Ranks(rank, size, local_size)
    dist.destroy_process_group()  # not after an error: others may be gone, and this process is about to end


def _read(name: str, default: int | None = None) -> int:
    text = os.environ.get(name, "" if default is None else str(default))
    if not text.isdigit():
        raise InputError(f"{name} is {text!r} in the environment, expected a number; {_REMEDY}")
    return int(text)
