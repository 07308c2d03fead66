"""Triplets of one's own as an evaluation set: what `dqe-train --triplets` trains on, `dqe-eval --triplets` evaluates on."""

from __future__ import annotations

from pathlib import Path

from dqe_engine.contracts.parsing import without_mark
from dqe_engine.errors import InputError
from dqe_engine.files import describe_os_error, read_regular

from ..data.image_folder import image_files
from ..data.records import ImageRecord, TripletRecord, check_texts, read_jsonl
from .protocol import EvaluationSet, evaluation_set


def load_own_data(triplets: Path, images: Path, *, image_labels: Path | None = None, gallery: Path | None = None) -> EvaluationSet:
    """Queries of `triplets` (JSON lines) over every image that they or `image_labels` (JSON lines) name, names ascending.

    `gallery` adds more: a folder in `images`, whose images all count, or a text file of names, one a line. Names are relative to
    `images`. Raises InputError; whether the images can be read is looked at later.
    """
    if not images.is_dir():
        raise InputError(f"{images}: no such image folder")
    records = read_jsonl(triplets, TripletRecord)
    check_texts(records, where=str(triplets))
    for number, record in enumerate(records, start=1):
        if record.reference == record.target:
            raise InputError(
                f"{triplets}, record {number}: {record.target} is its own reference, which its ranking leaves out; remove the triplet"
            )
    labels: dict[str, dict[str, str]] = {}
    for image in read_jsonl(image_labels, ImageRecord) if image_labels is not None else ():
        if labels.setdefault(image.image, image.attributes) != image.attributes:
            raise InputError(f"{image_labels}: {image.image} is labelled twice, and differently; keep one of the lines")
    names = {name for record in records for name in (record.reference, record.target)}
    names |= labels.keys() | set(_gallery_names(gallery, images) if gallery is not None else ())
    return evaluation_set(
        records, [ImageRecord(image=name, attributes=labels.get(name, {})) for name in sorted(names)], where=str(triplets)
    )


def _gallery_names(gallery: Path, images: Path) -> list[str]:
    if gallery.is_dir():
        if not gallery.resolve().is_relative_to(images.resolve()):
            raise InputError(f"{gallery}: not in {images}; a gallery folder must be a part of the image folder")
        found = [path.resolve().relative_to(images.resolve()).as_posix() for path in image_files(gallery)]
    else:
        try:
            text = without_mark(read_regular(gallery)).decode()
        except FileNotFoundError as error:
            wanted = f"expected names of images, one a line, or a folder in {images}"
            raise InputError(f"{gallery}: no such file or folder; {wanted}") from error
        except OSError as error:
            raise InputError(describe_os_error(error, gallery)) from error
        except UnicodeDecodeError as error:
            raise InputError(f"{gallery}: not UTF-8 text; expected the name of one image a line") from error
        found = [line.strip() for line in text.splitlines() if line.strip()]
    if not found:
        raise InputError(f"{gallery}: names no image; add some, or leave out --gallery to search the triplets' images alone")
    return found
