"""What transformers' own processor and tokenizer make of the made-up images and texts: stored, so that the runtime is held to it anywhere.

    PYTHONPATH=tests python -m support.upstream_expectations      # write the files again, with transformers 5.18 or newer

Older versions drop transparency instead of laying it over white. Left out: JPEG, whose pixels are the decoder's, and 16 bits, which
upstream clips to white.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from tokenizers import Tokenizer

from dqe_export.reading_samples import TEXTS, sample_images
from dqe_training.data.garments.catalog import vocabulary
from dqe_training.tokenizer import build_tokenizer

SIZE, MAX_LENGTH = 16, 32
PIXELS = Path(__file__).parent / "expectations" / "pixel_values.npz"
TOKENS = Path(__file__).parent / "expectations" / "token_ids.json"
_NOT_UPSTREAMS = ("JPEG", "16 bits")


def images() -> dict[str, bytes]:
    return {name: data for name, data in sample_images(SIZE).items() if name not in _NOT_UPSTREAMS}


def our_tokenizer() -> Tokenizer:
    """As training builds it, from the words of the garments' vocabulary."""
    return build_tokenizer([word for attribute in vocabulary().attributes for word in attribute.words])


def upstream_pixels() -> dict[str, NDArray[np.float32]]:
    """(3, 16, 16) of every image, by `BlipImageProcessor` on Pillow, from the image as Pillow opens it, turned upright."""
    import transformers

    processor = transformers.BlipImageProcessorPil(size={"height": SIZE, "width": SIZE})
    upright = {name: ImageOps.exif_transpose(Image.open(io.BytesIO(data))) for name, data in images().items()}
    return {name: np.asarray(processor(images=image, return_tensors="np")["pixel_values"])[0] for name, image in upright.items()}


def upstream_tokens() -> dict[str, list[list[int]]]:
    """Ids and masks of all texts in one batch, by the `BertTokenizer` that BLIP-2 has, on the vocabulary of `our_tokenizer`."""
    import transformers

    tokenizer = transformers.BertTokenizer(vocab=our_tokenizer().get_vocab())
    found = tokenizer(list(TEXTS.values()), padding="longest", truncation=True, max_length=MAX_LENGTH)
    return {name: found[name] for name in ("input_ids", "attention_mask")}


def main() -> None:
    PIXELS.parent.mkdir(exist_ok=True)
    np.savez_compressed(PIXELS, **upstream_pixels())
    TOKENS.write_text(json.dumps(upstream_tokens()) + "\n")


if __name__ == "__main__":
    main()
