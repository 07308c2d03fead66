"""`Indexer`: an index brought up to date with images and metadata. What is compared is content, never names or dates.

First a plan: which images are new, which differ from what was indexed under their id, what is gone; files are read, nothing is
written. Then the rest is prepared (removals, metadata), and images are embedded.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

from .contracts.preprocessing import PreprocessingSpec
from .errors import InputError
from .image_policy import DEFAULT_POLICY, ImagePolicy, open_regular
from .image_sources import Pixels, map_ahead
from .index import GalleryIndex, Snapshot
from .index.validation import check_count, check_ids, checked_metadata, quoted
from .preprocessing import ImageLike, fit_image, open_image
from .results import EncodedImages, IndexingReport, SkippedImage

Progress = Callable[[int, int], None]
OnError = Literal["raise", "skip"]
Pairs = list[tuple[str, ImageLike]]
Entry = Mapping[str, Any] | None

_DIGEST_BYTES = 16
_READ_BYTES = 1 << 20
_COMPARED_AHEAD = 64
_DESCRIBED_AT_ONCE = 256


@dataclass(frozen=True)
class IndexingPlan:
    """`to_embed`: new images and those that differ, in the order that they were given. `metadata`: as given, by id. `report`: how the
    work will end, if no image is skipped that is not skipped already."""

    to_embed: Pairs
    metadata: Mapping[str, Entry]
    report: IndexingReport


class Indexer:
    """Brings `index` up to date. One indexer at a time writes to an index; it may be searched meanwhile.

    An item's `content` is the BLAKE2b hash of its file's bytes; of a PIL image, which has no file, that of the pixels that the model
    sees.
    """

    def __init__(
        self,
        index: GalleryIndex,
        encode: Callable[[Sequence[Pixels]], EncodedImages],
        spec: PreprocessingSpec,
        *,
        policy: ImagePolicy = DEFAULT_POLICY,
        threads: int = 4,
    ) -> None:
        """`encode`: of pixels as `fit_image` gives them. `threads`: that read and decode. Raises InputError."""
        check_count("decode_threads", threads, 1)
        self.index = index
        self._encode, self._spec, self._policy, self._threads = encode, spec, policy, threads

    def plan(
        self,
        pairs: Sequence[tuple[str, ImageLike]],
        *,
        metadata: Mapping[str, Entry] | None = None,
        ignore_unknown: bool = False,
        add_only: bool = False,
        rehash: bool = False,
        prune: str | None = None,
        on_error: OnError = "raise",
        progress: Progress | None = None,
    ) -> IndexingPlan:
        """Compare (id, image) pairs with the index.

        metadata: by id, of these images or of other items of the index; it takes the place of what an item had, as a whole. Items
        without any keep theirs. ignore_unknown: pass over metadata of other ids, which is an error otherwise. add_only: refuse to change
        items that are there. rehash: embed those anew whose content was not recorded. prune: remove the items whose id begins with
        this, "" for all, and is not among `pairs`. on_error: "skip" reports ids that cannot be one, "raise" raises. progress: called
        now and then with (items compared, items to compare).

        Raises InputError.
        """
        if on_error not in ("raise", "skip"):
            raise InputError(f"on_error is 'raise' or 'skip', got {on_error!r}")
        skipped: list[SkippedImage] = []
        usable = _usable(pairs, skipped) if on_error == "skip" else list(pairs)
        check_ids([id for id, _ in usable])
        now, ids = self.index.snapshot(), {id for id, _ in usable}
        contents = {id: now.content(row) for id, _ in usable if (row := now.row(id)) is not None}
        gone = () if prune is None else tuple(id for id in now.ids() if id.startswith(prune) and id not in ids)
        entries = _known(metadata or {}, ids | set(now.ids()) - set(gone), ignore_unknown=ignore_unknown)

        differs = self._differing(contents, usable, rehash, progress)
        described = _described(now, {id: entry for id, entry in entries.items() if id not in differs})
        if add_only and (differs or described):
            what = f"{len(differs)} images differ from those that were indexed under the same ids, and {len(described)} have other metadata"
            remedy = "other images need other ids (a prefix, say); to change these items, leave out add_only"
            raise InputError(f"{what}: {quoted([*differs, *described])}; {remedy}")
        unchanged = tuple(id for id in contents if id not in differs and id not in described)
        report = IndexingReport(
            added=tuple(id for id, _ in usable if id not in contents),
            changed=tuple(differs),
            described=tuple(described),
            unchanged=unchanged,
            unrecorded=tuple(id for id in unchanged if contents[id] is None),
            skipped=tuple(skipped),
            pruned=gone,
        )
        return IndexingPlan([(id, image) for id, image in usable if id not in contents or id in differs], entries, report)

    def prepare(self, plan: IndexingPlan, save: Callable[[], None] | None = None) -> None:
        """Do all that is planned but embed images. `save`: see `describe`."""
        if plan.report.pruned:
            self.index.remove(plan.report.pruned)
        describe(self.index, {id: plan.metadata[id] for id in plan.report.described}, save)

    def embed(
        self,
        plan: IndexingPlan,
        *,
        batch_size: int = 32,
        on_error: OnError = "raise",
        progress: Progress | None = None,
        dry_run: bool = False,
    ) -> IndexingReport:
        """Embed the planned images. Whatever stops it, the batches that were added stay.

        progress: called after every batch with (images done, images to embed); what it raises stops the work between two batches.
        on_error: "raise" stops at an image that cannot be read, "skip" goes on and reports it; its item, if any, stays as it is.
        dry_run: decode the images, which tells those that cannot be read, and change nothing. Raises InputError.
        """
        check_count("batch_size", batch_size, 1)
        skipped: list[SkippedImage] = []
        batch: list[tuple[str, _Decoded]] = []
        decoded = map_ahead(self._decode, plan.to_embed, ahead=2 * batch_size, threads=self._threads)
        with closing(decoded):
            for done, (id, found) in enumerate(decoded, start=1):
                if not isinstance(found, InputError):
                    batch.append((id, found))
                elif on_error == "raise":
                    raise found
                else:
                    skipped.append(SkippedImage(id, str(found)))
                if len(batch) == batch_size or done == len(plan.to_embed):
                    if batch and not dry_run:
                        self._add_batch(batch, plan.metadata)
                    batch = []
                    if progress is not None:
                        progress(done, len(plan.to_embed))
        return without_skipped(plan.report, skipped)

    def _add_batch(self, batch: Sequence[tuple[str, _Decoded]], metadata: Mapping[str, Entry]) -> None:
        encoded = self._encode([found.pixels for _, found in batch])
        ids = [id for id, _ in batch]
        self.index.add(
            ids,
            encoded.target_tokens,
            None if self.index.image_storage == "none" else encoded.image_tokens,
            metadata_for(self.index, ids, metadata),
            contents=[found.content for _, found in batch],
            replace=True,
        )

    def _differing(
        self, contents: Mapping[str, str | None], pairs: Sequence[tuple[str, ImageLike]], rehash: bool, progress: Progress | None
    ) -> dict[str, None]:
        """Ids of the items, in the order of `pairs`, whose image is no longer the one with this content."""
        compared: Pairs = [(id, image) for id, image in pairs if contents.get(id) is not None]
        differs = {id: None for id, _ in pairs if id in contents and contents[id] is None} if rehash else {}
        with closing(map_ahead(self._content_of, compared, ahead=_COMPARED_AHEAD, threads=self._threads)) as found:
            for done, (id, content) in enumerate(found, start=1):
                if content != contents[id]:
                    differs[id] = None
                if progress is not None and (done % _COMPARED_AHEAD == 0 or done == len(compared)):
                    progress(done, len(compared))
        return {id: None for id, _ in pairs if id in differs}

    def _content_of(self, image: ImageLike) -> str | None:
        """None for an image that cannot be read: decoding it tells why."""
        try:
            if isinstance(image, Image.Image):
                return _content_of_pixels(fit_image(open_image(image, self._spec, self._policy), self._spec))
            return self._content_of_file(image)
        except (InputError, OSError):
            return None

    def _content_of_file(self, image: os.PathLike[str] | bytes) -> str | None:
        digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
        if isinstance(image, bytes):
            digest.update(image)
            return digest.hexdigest()
        with open_regular(image) as stream:
            if os.fstat(stream.fileno()).st_size > self._policy.max_bytes:
                return None
            while chunk := stream.read(_READ_BYTES):
                digest.update(chunk)
        return digest.hexdigest()

    def _decode(self, image: ImageLike) -> _Decoded | InputError:
        try:
            # First: should the file change before it is decoded, the hash is that of the old one, so that the next plan finds out.
            content = None if isinstance(image, Image.Image) else self._content_of(image)
            pixels = fit_image(open_image(image, self._spec, self._policy), self._spec)
            return _Decoded(_content_of_pixels(pixels) if isinstance(image, Image.Image) else content, pixels)
        except InputError as error:
            return error


class _Decoded(NamedTuple):
    content: str | None
    pixels: Pixels


def metadata_for(index: GalleryIndex, ids: Sequence[str], given: Mapping[str, Entry]) -> list[Entry]:
    """What is given for the ids, else what their items have."""
    now = index.snapshot()
    rows = [now.row(id) for id in ids]
    return [given[id] if id in given else None if row is None else now.item(row).metadata for id, row in zip(ids, rows, strict=True)]


def describe(index: GalleryIndex, metadata: Mapping[str, Entry], save: Callable[[], None] | None = None) -> None:
    """Give items of the index other metadata. Their tokens are copied: `save` is called after some of them at a time, so that the copies
    of a large catalogue need not all be in memory."""
    entries = list(metadata.items())
    for start in range(0, len(entries), _DESCRIBED_AT_ONCE):
        index.update_metadata(dict(entries[start : start + _DESCRIBED_AT_ONCE]))
        if save is not None:
            save()


def plan_metadata(index: GalleryIndex, metadata: Mapping[str, Entry], *, ignore_unknown: bool = False) -> IndexingPlan:
    """A plan for metadata alone; its work is `describe`. Raises InputError as `Indexer.plan` does."""
    now = index.snapshot()
    entries = _known(metadata, set(now.ids()), ignore_unknown=ignore_unknown)
    described = _described(now, entries)
    unchanged = tuple(id for id in now.ids() if id not in described)
    return IndexingPlan([], entries, IndexingReport(described=tuple(described), unchanged=unchanged))


def without_skipped(report: IndexingReport, skipped: Sequence[SkippedImage]) -> IndexingReport:
    """The report of a plan of which these images could not be read after all."""
    bad = {image.id for image in skipped}
    return replace(
        report,
        added=tuple(id for id in report.added if id not in bad),
        changed=tuple(id for id in report.changed if id not in bad),
        skipped=(*report.skipped, *skipped),
    )


def _content_of_pixels(pixels: Pixels) -> str:
    return "pixels:" + hashlib.blake2b(np.ascontiguousarray(pixels).data, digest_size=_DIGEST_BYTES).hexdigest()


def _described(now: Snapshot, entries: Mapping[str, Entry]) -> dict[str, None]:
    """Ids of the items that have other metadata than these entries. None is as good as an empty object."""
    rows = {id: row for id in entries if (row := now.row(id)) is not None}
    return {id: None for id, row in rows.items() if (entries[id] or None) != (now.item(row).metadata or None)}


def _known(metadata: Mapping[str, Entry], ids: set[str], *, ignore_unknown: bool) -> dict[str, Entry]:
    """The metadata of these ids, checked."""
    if (unknown := [id for id in metadata if id not in ids]) and not ignore_unknown:
        raise InputError(
            f"metadata for {len(unknown)} ids that neither the images nor the index have: {quoted(unknown)}; correct them, or pass "
            "ignore_unknown"
        )
    return {id: checked_metadata(id, entry) for id, entry in metadata.items() if id in ids}


def _usable(pairs: Sequence[tuple[str, ImageLike]], skipped: list[SkippedImage]) -> Pairs:
    """Pairs whose id can be one; the others (file names that are not Unicode) are added to `skipped`."""
    usable = []
    for id, image in pairs:
        try:
            check_ids([id])
            usable.append((id, image))
        except InputError as error:
            skipped.append(SkippedImage(id, str(error)))
    return usable
