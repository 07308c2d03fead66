"""The tokenizer of an imported model: bert-base-uncased's words and `[DEC]`. LAVIS-like files bring none."""

from __future__ import annotations

import os
import re
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from dqe_engine.errors import CheckpointError, InputError
from dqe_engine.files import describe_os_error, require_regular

from ..backbone.tokenizer import hold_to_table, read_tokenizer

DEFAULT = "google-bert/bert-base-uncased"
DEC = "[DEC]"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def load_tokenizer(source: str, rows: int) -> Tokenizer:
    """The tokenizer of `source`, a tokenizer.json, a vocab.txt, a folder with either, or "owner/name" on the hub, for an embedding table
    of `rows`; `[DEC]` is added as its last row where the source ends before. Raises CheckpointError, and InputError for no source."""
    path = _find(source)
    tokenizer = _from_words(path) if path.suffix == ".txt" else read_tokenizer(path, rows)
    if tokenizer.get_vocab_size() == rows - 1 and tokenizer.token_to_id(DEC) is None:
        tokenizer.add_special_tokens([DEC])
    if (found := tokenizer.get_vocab_size()) != rows:
        raise CheckpointError(f"{path}: has {found} tokens, the embedding table {rows} rows; give the model's own with --tokenizer")
    return hold_to_table(tokenizer, path, rows)


def _find(source: str) -> Path:
    path = Path(os.path.expanduser(source))
    if path.is_dir():
        for name in ("tokenizer.json", "vocab.txt"):
            if (path / name).is_file():
                return path / name
        raise InputError(f"{path}: no tokenizer.json and no vocab.txt here; copy one from {DEFAULT}")
    if path.exists():
        try:
            require_regular(path)
        except OSError as error:
            raise CheckpointError(describe_os_error(error)) from error
        return path
    if not _HUB_NAME.fullmatch(source) or path.suffix in (".json", ".txt"):
        raise InputError(f"--tokenizer {source}: no such file; give a tokenizer.json or vocab.txt, or a name on the hub ({DEFAULT})")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(hf_hub_download(source, "tokenizer.json"))
    except (OSError, HfHubHTTPError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise CheckpointError(
            f"--tokenizer {source}: not on this machine and cannot be fetched from the hub ({reason}); connect, or copy its vocab.txt here "
            "and give its path"
        ) from error


def _from_words(path: Path) -> Tokenizer:
    """BERT's uncased tokenizer from a vocab.txt, a token a line."""
    try:
        words = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise CheckpointError(describe_os_error(error)) from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not a vocabulary in UTF-8; copy it again") from error
    words = [word.rstrip("\r") for word in (words[:-1] if words[-1] == "" else words)]
    vocabulary = {word: row for row, word in enumerate(words)}
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
    if len(vocabulary) != len(words) or not all(token in vocabulary for token in special):
        raise CheckpointError(f"{path}: not BERT's vocabulary, a token a line, none twice, with {', '.join(special)}; copy it again")
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens([token for token in (*special, "[MASK]") if token in vocabulary])
    ends = [(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return tokenizer
