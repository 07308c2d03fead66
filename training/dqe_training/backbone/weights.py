"""Weights from safetensors into a model that is there already: one tensor at a time, every key accounted for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from dqe_engine.contracts.parsing import NOT_JSON
from dqe_engine.errors import CheckpointError
from dqe_engine.files import describe_os_error, read_regular, require_regular

from ..model import DQEModel

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
UNUSED = ("itm_head.weight", "itm_head.bias", "embeddings.position_ids", "qformer.embeddings.position_ids")
"""Upstream's keys that the model has no use for: the matching head (not exportable, and trained for another loss), and
buffers that older versions stored."""
HEADS = "attribute_heads."
"""The attribute heads' keys: what a vocabulary of one's own trains anew."""
TEMPERATURE = "temperature_log_scale"
NEW = (HEADS, "base_pool.", TEMPERATURE)
"""The model's keys that no BLIP-2 checkpoint has; all others have upstream's names."""
_PICKLES = ("*.bin", "*.pth", "*.pt", "*.ckpt")


class _Index(msgspec.Struct, frozen=True):
    weight_map: dict[str, str]


def load_backbone_weights(model: DQEModel, directory: Path) -> None:
    """Copy a `Blip2ForImageTextRetrieval` into `model`, whose dtypes stay; what is `NEW` keeps its values.

    A vision tower on the meta device is given memory first. Raises CheckpointError, one line that names the key: for a
    key that is missing, unknown, of another shape or there twice, for damaged files, and for pickles.
    """
    files = weight_files(directory)
    copy_weights(model, files, unused=UNUSED, new=NEW, where=directory)


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint directory, in order. Raises CheckpointError."""
    index = directory / INDEX
    if index.is_file():
        try:
            names = sorted(set(msgspec.json.decode(read_regular(index), type=_Index).weight_map.values()))
        except NOT_JSON as error:
            raise CheckpointError(f"{index}: damaged, it does not say which file holds what; copy it again") from error
        if any(Path(name).name != name for name in names):
            raise CheckpointError(f"{index}: names files of other folders; do not use this checkpoint")
        files = [directory / name for name in names]
        for file in files:
            if not file.is_file():
                raise CheckpointError(f"{file}: missing, but {INDEX} lists it; copy the whole checkpoint")
        return files
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    pickles = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{directory / pickles[0]}: a pickle, which can run code when it is loaded; convert it where you trust it: "
            f"transformers.Blip2ForImageTextRetrieval.from_pretrained(DIR).save_pretrained(NEW)"
        )
    raise CheckpointError(f"{directory}: no {SINGLE} or {INDEX} here; give a directory with safetensors weights")


@contextmanager
def reading_weights(path: Path) -> Iterator[None]:
    """Raise CheckpointError, one line, where the block cannot read the safetensors file at `path`."""
    try:
        require_regular(path)
        path.open("rb").close()  # safetensors calls every file that it may not open missing
    except OSError as error:
        raise CheckpointError(describe_os_error(error)) from error
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged or truncated ({' '.join(str(error).split())[:160]}); copy it again") from error


def copy_weights(
    model: nn.Module, files: list[Path], *, unused: tuple[str, ...] = (), new: str | tuple[str, ...] = (), where: Path
) -> None:
    """Copy every tensor of `files` to the parameter or buffer of its name, one at a time.

    Keys in `unused` are skipped; the model's keys that start with `new` need not be there. Raises CheckpointError.
    """
    for module in model.children():
        if any(p.is_meta for p in module.parameters()):
            module.to_empty(device="cpu")
    wanted = model.state_dict()
    left = {name for name in wanted if not name.startswith(new)}
    for path in files:
        with reading_weights(path), safe_open(path, framework="pt") as stream:
            for name in stream.keys():  # noqa: SIM118 (not a mapping)
                if name in unused:
                    continue
                if name not in wanted:
                    raise CheckpointError(f"{path}: unknown weight {name}; the configuration describes no such part")
                if name not in left:
                    raise CheckpointError(f"{path}: {name} is there twice, or is not part of a backbone; copy the checkpoint again")
                found, shape = tuple(stream.get_slice(name).get_shape()), tuple(wanted[name].shape)
                if found != shape:
                    raise CheckpointError(f"{path}: {name} has shape {found}, the configuration wants {shape}")
                with torch.no_grad():
                    wanted[name].copy_(stream.get_tensor(name))
                left.discard(name)
    if left:
        raise CheckpointError(f"{where}: {len(left)} weights are missing, the first is {min(left)}; copy the whole checkpoint")
