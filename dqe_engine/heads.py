"""Attribute heads alone: a folder of two files that takes the place of a bundle's own heads, whose encoder it was trained on."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec

from .bundle import Bundle, check_file, read_schema
from .contracts.graphs import ATTRIBUTE_HEADS, graphs_of
from .contracts.manifest import COMPOSED_QUERY, HEADS_FILE, MANIFEST_FILE, REPORT_FILES, BundleManifest, HeadsManifest, graph_files
from .contracts.parsing import to_json
from .errors import BundleError, InputError
from .files import atomic_directory, describe_write_error
from .graph_files import check_weights
from .sessions import OnnxSession


def load_heads(path: str | os.PathLike[str]) -> HeadsManifest:
    """Parse and verify a folder that `dqe-export --heads-only` wrote. Raises BundleError."""
    root = Path(path)
    manifest = read_schema(HeadsManifest, root / HEADS_FILE, "no attribute heads here", "dqe-export --heads-only")
    where = root / HEADS_FILE
    if manifest.vocabulary.hash != manifest.vocabulary_hash:
        raise BundleError(f"{where}: the vocabulary is not the one that the heads were exported with; export them again")
    if not manifest.vocabulary.attributes:
        raise BundleError(f"{where}: names no attributes, so there is nothing to give to a bundle; export heads of a model that has some")
    if manifest.sizes.attributes != (named := len(manifest.vocabulary.attributes)):
        raise BundleError(
            f"{where}: {manifest.sizes.attributes} attribute heads, but {named} attributes in the vocabulary; export the heads again"
        )
    listed = [entry.path for entry in manifest.files]
    if ATTRIBUTE_HEADS.file not in listed or not set(listed) <= set(graph_files(ATTRIBUTE_HEADS)):
        raise BundleError(f"{where}: lists {', '.join(listed) or 'no files'}, expected {ATTRIBUTE_HEADS.file}; export the heads again")
    for entry in manifest.files:
        check_file(root, entry, hashed=True, listed_in=HEADS_FILE)
    check_weights(root, ATTRIBUTE_HEADS, manifest.files)
    return manifest


def replace_heads(
    bundle: str | os.PathLike[str],
    heads: str | os.PathLike[str],
    *,
    new_vocabulary: bool = False,
    check: Callable[[Path, BundleManifest], BundleManifest] = lambda path, manifest: manifest,
) -> BundleManifest:
    """Give `bundle` the attribute heads in the folder `heads`, with their vocabulary and zones; whole or not at all. It may have had none.

    Everything else stays as it is, and so do indexes made with the bundle; engines that serve it go on with what they loaded. The
    export's report goes, since it is no longer of this bundle, and a TensorRT engine of the old heads is refused from then on.
    `check`: called on the finished copy before it takes the bundle's place; may raise, and returns the manifest that is kept.

    Raises BundleError when either is damaged, and InputError when the heads were trained on another encoder, are in another
    precision, or name other attributes and `new_vocabulary` does not allow that (callers may name the old ones).
    """
    loaded, new = Bundle.load(bundle), load_heads(heads)
    loaded.require_own()
    old, root = loaded.manifest, loaded.path
    _check_fit(root, old, Path(heads), new, new_vocabulary=new_vocabulary)
    OnnxSession(Path(heads) / ATTRIBUTE_HEADS.file, ATTRIBUTE_HEADS, new.sizes, provider="cpu", threads=1)  # it runs, before it replaces
    kept = [entry for entry in old.files if entry.path not in graph_files(ATTRIBUTE_HEADS)]
    measured = [parity for parity in old.parity if parity.graph not in (ATTRIBUTE_HEADS.name, COMPOSED_QUERY)]
    manifest = msgspec.structs.replace(
        old,
        producer=new.producer,
        sizes=new.sizes,
        graphs=graphs_of(new.sizes),
        vocabulary=new.vocabulary,
        zones=new.zones,
        parity=(*measured, new.parity),
        retrieval=None,
        files=tuple(sorted((*kept, *new.files), key=lambda entry: entry.path)),
    )
    try:
        with atomic_directory(root, replace=True, marker=MANIFEST_FILE) as temporary:
            _link_files(root, temporary, without=(MANIFEST_FILE, *REPORT_FILES, *graph_files(ATTRIBUTE_HEADS)))
            for entry in new.files:
                shutil.copyfile(Path(heads) / entry.path, temporary / entry.path)
            (temporary / MANIFEST_FILE).write_bytes(to_json(manifest))
            manifest = check(temporary, manifest)
            (temporary / MANIFEST_FILE).write_bytes(to_json(manifest))
            Bundle.load(temporary)
    except OSError as error:
        raise BundleError(describe_write_error(error, root)) from error
    return manifest


def _check_fit(bundle: Path, old: BundleManifest, heads: Path, new: HeadsManifest, *, new_vocabulary: bool) -> None:
    if new.encoder_hash != old.encoder_hash:
        raise InputError(
            f"{heads}: trained on another encoder than that of {bundle} ({new.encoder_hash[:12]}, it has {old.encoder_hash[:12]}); train "
            "them with start= its checkpoint and finetune=attributes, or export the whole bundle"
        )
    if new.precision != old.precision:
        raise InputError(f"{heads}: in {new.precision}, {bundle} is in {old.precision}; export the heads with the bundle's --precision")
    if msgspec.structs.replace(new.sizes, attributes=old.sizes.attributes) != old.sizes:
        raise InputError(f"{heads}: the model has other sizes ({new.sizes}) than {bundle} ({old.sizes}); export the whole bundle")
    if new.vocabulary.names != old.vocabulary.names and old.vocabulary.names and not new_vocabulary:
        raise InputError(
            f"{heads}: its attributes are {', '.join(new.vocabulary.names)}, those of {bundle} {', '.join(old.vocabulary.names)}; callers "
            "may name the old ones, so allow this with --new-vocabulary"
        )


def _link_files(source: Path, target: Path, *, without: tuple[str, ...]) -> None:
    """Hard links to all files but those, so that gigabytes are not copied; copies where the disk has no links.

    To files that the manifest does not list, too: engines, and whatever the user keeps there.
    """
    for file in sorted(path for path in source.rglob("*") if path.is_file()):
        name = file.relative_to(source)
        if name.as_posix() in without:
            continue
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(file, target / name)
        except OSError:
            shutil.copyfile(file, target / name)
