"""A WordPiece tokenizer built from a training set's texts, in the shape of BERT's (lower case, [CLS] text [SEP])."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


def build_tokenizer(texts: Iterable[str], *, vocab_size: int = 1024) -> Tokenizer:
    """Train on `texts`. Letters, digits and punctuation are always in the vocabulary, so unseen words decompose.

    The same texts give the same ids: the trainer numbers continuing characters in the order of a hash table, so they are
    given to it in ours, as special tokens, and are plain entries of the tokenizer that is returned.
    """
    texts = list(texts)
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    seen = Counter(c for text in texts for c in tokenizer.normalizer.normalize_str(text) if not c.isspace())
    always = [c for c in string.printable.lower() if not c.isspace()]
    common = sorted(seen, key=lambda c: (-seen[c], c))[: vocab_size // 4]
    characters = sorted({*always, *common})
    continuing = [f"##{c}" for c in characters]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=[*SPECIAL_TOKENS, *continuing], initial_alphabet=characters,
        limit_alphabet=len(characters), show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    trained = Tokenizer(models.WordPiece(tokenizer.get_vocab(), unk_token="[UNK]"))
    trained.normalizer, trained.pre_tokenizer, trained.decoder = tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder
    trained.add_special_tokens(list(SPECIAL_TOKENS))
    start, end = trained.token_to_id("[CLS]"), trained.token_to_id("[SEP]")
    trained.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", start), ("[SEP]", end)])
    return trained
