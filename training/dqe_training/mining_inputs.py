"""What dqe-mine reads, from a checkpoint and a training set: query embeddings, the gallery's target tokens, and ids."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import torch

from dqe_engine.errors import InputError
from dqe_engine.files import atomic_directory, describe_write_error

from .checkpointing.checkpoint import Checkpoint
from .data.triplets import TextBatcher
from .encoding import Listener, evaluating
from .features import image_token_blocks
from .run.workflow import TrainingSource

IMAGES_FILE = "images.json"
_QUERY_BATCH = 256


def write_mining_inputs(
    checkpoint: Checkpoint,
    source: TrainingSource,
    out: Path,
    *,
    storage: Literal["f32", "f16"] = "f32",
    force: bool = False,
    features: Path | None = None,
    listener: Listener = lambda event: None,
) -> None:
    """Write the folder `out`, whole or not at all. Position i of the gallery is the i-th name of images.json.

    queries.npy (T, D) float32, composed; gallery.npy (I, M, D) of `storage`; targets.npy (T,) int64; exclude.npy (T, 1)
    int64, the references, or -1 where the dataset ranks them. `features`: a feature cache to take image tokens from.
    Raises InputError, also where `out` exists (with `force`: where it holds something else).
    """
    model = checkpoint.model.to("cuda" if torch.cuda.is_available() else "cpu")
    config, sizes, device = model.config, model.sizes, model.query_tokens.device
    try:
        with atomic_directory(out, replace=force, marker=IMAGES_FILE) as new:
            data = source.read(source.read_vocabulary() if source.vocabulary else checkpoint.vocabulary)
            texts = TextBatcher(checkpoint.tokenizer, data.texts, max_length=config.qformer.max_text_length, captions=config.captions)
            dtype = np.dtype("<f4" if storage == "f32" else "<f2")
            shape = (len(data.images), sizes.target_tokens, sizes.embedding_dim)
            queries = np.empty((len(data), sizes.embedding_dim), np.float32)
            # Written as it comes, not through a mapping: where the disk is full, that is an error and not a SIGBUS.
            with open(new / "gallery.npy", "wb") as gallery, evaluating(model):
                np.lib.format.write_array_header_1_0(gallery, {"descr": dtype.str, "fortran_order": False, "shape": shape})
                stop = 0
                for block in image_token_blocks(model, source.images, data.images, features=features, listener=listener):
                    tokens = block.to(device).float()
                    start, stop = stop, stop + len(tokens)
                    gallery.write(model.encode_targets(tokens).float().cpu().numpy().astype(dtype).tobytes())
                    # The queries of these reference images, while their tokens are at hand.
                    (rows,) = np.nonzero((data.reference >= start) & (data.reference < stop))
                    for part in np.array_split(rows, -(-len(rows) // _QUERY_BATCH) or 1):
                        if len(part):
                            ids, mask = (t.to(device) for t in texts(torch.from_numpy(part)))
                            references = tokens[torch.from_numpy(data.reference[part] - start).to(device)]
                            queries[part] = model.encode_query(references, ids, mask).query.float().cpu().numpy()
                    listener({"event": "encode", "done": stop, "total": len(data.images)})
            np.save(new / "queries.npy", queries)
            np.save(new / "targets.npy", data.target)
            np.save(new / "exclude.npy", data.excluded)
            (new / IMAGES_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(data.images)) + b"\n")
    except OSError as error:
        if isinstance(error, FileExistsError) and error.strerror is None:  # of atomic_directory, with its own advice
            raise InputError(f"{error}" if force else f"{error}; choose another folder, or replace it with --force") from error
        raise InputError(describe_write_error(error, out)) from error
