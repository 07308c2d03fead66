"""A WordPiece tokenizer built from a training set's texts, in the shape of BERT's (lower case, [CLS] text [SEP])."""

from __future__ import annotations

import string
from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


def build_tokenizer(texts: Iterable[str], *, vocab_size: int = 1024) -> Tokenizer:
    """Train on `texts`. Letters, digits and punctuation are always in the vocabulary, so unseen words decompose."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    characters = [c for c in string.printable.lower() if not c.isspace()]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=characters, show_progress=False
    )
    pieces = [f"a{c}" for c in string.ascii_lowercase + string.digits]  # so that every letter has its continuing piece
    tokenizer.train_from_iterator([*texts, *pieces], trainer)
    start, end = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", start), ("[SEP]", end)])
    return tokenizer
