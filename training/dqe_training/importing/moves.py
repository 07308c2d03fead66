"""What becomes of a file's tensors: each goes to one of the model's, or is left out for a reason. Checked without reading a value."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dqe_engine.errors import CheckpointError

from .reading import Stored


def _as_it_is(parts: Sequence[Tensor]) -> Tensor:
    return parts[0]


@dataclass(frozen=True)
class Move:
    """`make` of the tensors called `sources` becomes the model's tensor. Without sources it is zero."""

    sources: tuple[str, ...]
    make: Callable[[Sequence[Tensor]], Tensor] = _as_it_is


@dataclass
class Moves:
    """By the model's names. `unused`: why a tensor of the file goes nowhere."""

    made: dict[str, Move] = field(default_factory=dict)
    unused: dict[str, str] = field(default_factory=dict)

    def add(self, target: str, *sources: str, make: Callable[[Sequence[Tensor]], Tensor] = _as_it_is) -> None:
        self.made[target] = Move(sources, make)

    def leave(self, names: Mapping[str, Stored], reasons: Mapping[str, str]) -> None:
        """Leave out each name that is a key of `reasons`, or begins with one that ends in a dot."""
        for name in names:
            for key, reason in reasons.items():
                if name == key or (key.endswith(".") and name.startswith(key)):
                    self.unused[name] = reason


def check_moves(moves: Moves, tensors: Mapping[str, Stored], wanted: Mapping[str, torch.Size], *, where: str) -> None:
    """Raise CheckpointError, which names the tensor, unless each of `tensors` is used or left out, all that a move needs are there and
    floating, and what is made has the shape that the model wants, with nothing wanted left unmade."""
    used = {source for move in moves.made.values() for source in move.sources}
    if missing := sorted(used - set(tensors)):
        raise CheckpointError(f"{where}: {missing[0]} is missing ({len(missing)} in all); copy the whole file")
    if strange := sorted(set(tensors) - used - set(moves.unused)):
        raise CheckpointError(f"{where}: unknown weight {strange[0]} ({len(strange)} in all); this layout has none, see --format")
    if unmade := sorted(set(wanted) - set(moves.made)):
        raise CheckpointError(
            f"{where}: its tensors describe a model with {unmade[0]} ({len(unmade)} in all), which none of them holds; copy the whole file"
        )
    for target, move in moves.made.items():
        if target not in wanted:
            raise CheckpointError(f"{where}: {move.sources[0]} does not belong to the model that the other tensors describe; see --format")
        for source in move.sources:
            if not tensors[source].dtype.is_floating_point:
                raise CheckpointError(f"{where}: {source} holds {tensors[source].dtype}, expected floating-point numbers")
        if move.sources:
            _check_shape(move, tensors, wanted[target], where)


def _check_shape(move: Move, tensors: Mapping[str, Stored], wanted: torch.Size, where: str) -> None:
    shapes = ", ".join(f"{source} has shape {tensors[source].shape}" for source in move.sources)
    try:
        found = move.make([torch.empty(tensors[source].shape, dtype=torch.float32, device="meta") for source in move.sources]).shape
    except (RuntimeError, IndexError) as error:
        raise CheckpointError(f"{where}: {shapes}, expected what makes {tuple(wanted)}; see --format, or copy it again") from error
    if found != wanted:
        raise CheckpointError(f"{where}: {shapes}; the other tensors need {tuple(wanted)}; see --format, or copy it again")
