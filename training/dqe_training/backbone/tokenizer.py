"""A BLIP-2 checkpoint's tokenizer, held to its embedding table."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer

from dqe_engine.contracts.tokenizer import TokenizerSpec
from dqe_engine.errors import CheckpointError
from dqe_engine.files import describe_os_error


def load_backbone_tokenizer(directory: Path, vocab_size: int, pad_id: int = 0) -> Tokenizer:
    """`tokenizer.json` without padding and truncation: [CLS] text [SEP], every id below `vocab_size`.

    Tokens that were added above the table (upstream's processor adds `<image>`) are dropped: a text that contains them
    would index past its end. `[DEC]`, the last row of the table, stays. Raises CheckpointError.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; write it with transformers: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)")
    return hold_to_table(read_tokenizer(path, vocab_size), path, vocab_size, pad_id)


def read_tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    """A `tokenizer.json` without the added tokens whose ids are `vocab_size` or more. Raises CheckpointError."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise CheckpointError(describe_os_error(error)) from error
    try:
        data = json.loads(raw)
        data["added_tokens"] = [token for token in data.get("added_tokens", []) if token["id"] < vocab_size]
        return Tokenizer.from_str(json.dumps(data))
    except Exception as error:  # tokenizers raises bare Exception for every kind of bad file
        raise CheckpointError(f"{path}: not a tokenizer file ({' '.join(str(error).split())[:160]}); copy it again") from error


def hold_to_table(tokenizer: Tokenizer, path: Path, vocab_size: int, pad_id: int = 0) -> Tokenizer:
    """`tokenizer` without padding and truncation. Raises CheckpointError, which names `path`, where it is none of BERT's kind whose ids lie
    below `vocab_size`."""
    tokenizer.no_padding()
    tokenizer.no_truncation()
    vocabulary = tokenizer.get_vocab()
    token, highest = max(vocabulary.items(), key=lambda item: item[1], default=("", -1))
    if highest >= vocab_size:
        raise CheckpointError(
            f"{path}: token {token!r} has id {highest}, the embedding table has {vocab_size} rows; take the checkpoint's own"
        )
    pad = TokenizerSpec().pad_token
    if vocabulary.get(pad) != pad_id:
        raise CheckpointError(f"{path}: {pad} has id {vocabulary.get(pad)}, the model pads with {pad_id}; take the checkpoint's own")
    tokens = tokenizer.encode("red").tokens
    if len(tokens) < 3 or (tokens[0], tokens[-1]) != ("[CLS]", "[SEP]"):
        raise CheckpointError(f"{path}: 'red' becomes {' '.join(tokens)}, expected it between [CLS] and [SEP]; take the checkpoint's own")
    return tokenizer
