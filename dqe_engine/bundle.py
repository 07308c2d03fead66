"""A bundle on disk: manifest, graphs and tokenizer, verified before anything is loaded."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeVar

import msgspec

from .contracts.graphs import ATTRIBUTE_HEADS, GraphSizes, GraphSpec, graphs_of
from .contracts.manifest import (
    MANIFEST_FILE,
    REPORT_FILES,
    ROW_INT8_SCHEMA,
    BundleManifest,
    FileEntry,
    HeadsManifest,
    graph_files,
)
from .contracts.versioned import describe_folder, read_document
from .contracts.vocabulary import AttributeVocabulary
from .errors import BackendError, BundleError, InputError
from .files import describe_os_error, recover_directory, sha256_of
from .graph_files import check_weights
from .hub_paths import Snapshot, is_reference
from .sessions import PROVIDERS, GraphSession, OnnxSession, Provider
from .tensorrt.engines import engine_folders, open_engine
from .tensorrt.onnx_runtime import provider_options
from .text import TextEncoder


@dataclass(frozen=True)
class Bundle:
    """A verified bundle. `session` and `text_encoder` open its parts anew at each call.

    `origin`: "hf://OWNER/NAME@COMMIT" if the bundle lies in the hub client's cache, where nothing of ours is written; else None.
    """

    path: Path
    manifest: BundleManifest
    origin: str | None = None

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, verify: bool = True) -> Bundle:
        """Parse `manifest.json` strictly and hold the directory against it: every file present, of its size and SHA-256.

        `path`: a folder, or a name on the hub (see `bundle_folder`). The export's report is no part of a bundle: it may be edited or
        deleted. `verify=False` skips the SHA-256 of the files, to save time with gigabytes on a trusted disk; files in the hub's cache are
        hashed all the same. Raises BundleError, one line, for a missing or damaged bundle, a newer schema, a path that leaves the
        directory, a graph that takes weights from a file that is not listed, or contradictory contents; for names on the hub also what
        `hub.fetch` does. If a replacement was killed after it had moved the bundle aside, the bundle is put back.
        """
        root = bundle_folder(path)
        try:
            recover_directory(root)
        except OSError as error:
            raise BundleError(
                f"{root}: its replacement was interrupted, and the old bundle is at {error.filename} ({error.strerror}); rename that "
                f"to {root.name}"
            ) from error
        manifest = _read_manifest(root)
        _check_contents(root / MANIFEST_FILE, manifest)
        for entry in manifest.files:
            check_file(root, entry, hashed=verify)
        for graph in manifest.graphs:
            check_weights(root, graph, manifest.files)
        snapshot = Snapshot.at(root)
        return cls(root, manifest, str(snapshot.reference) if snapshot else None)

    def is_current(self) -> bool:
        """Whether the folder still holds this bundle: meanwhile it may have been replaced, or have got other attribute heads."""
        try:
            return _read_manifest(self.path) == self.manifest
        except BundleError:
            return False

    def require_own(self) -> None:
        """Raises InputError for a bundle in the hub's cache, where nothing of ours is written."""
        if self.origin is not None:
            raise InputError(f"{self.origin}: a bundle in the hub's cache must not be changed; change a copy: cp -rL {self.path} BUNDLE")

    @property
    def model_hash(self) -> str:
        return self.manifest.model_hash

    @property
    def sizes(self) -> GraphSizes:
        return self.manifest.sizes

    @property
    def vocabulary(self) -> AttributeVocabulary:
        return self.manifest.vocabulary

    def session(self, graph: GraphSpec, *, provider: Provider = "auto", threads: int | None = None) -> GraphSession:
        """Open one of the manifest's graphs. Raises BackendError and BundleError as `OnnxSession` and `open_engine` do.

        "auto" takes an engine of this bundle where one fits and runs, else what `OnnxSession` takes; a damaged engine is an
        error all the same. `threads` is for ONNX Runtime. Engines are machine code: none is taken from the hub's cache.
        """
        if provider not in PROVIDERS:
            raise InputError(f"unknown provider {provider!r}; choose {', '.join(PROVIDERS)}")
        if provider == "tensorrt":
            self.require_own()
            return open_engine(self.path, self.manifest.graph_hash(graph), graph, self.sizes)
        if provider == "auto" and self.origin is None and engine_folders(self.path):
            with contextlib.suppress(BackendError):
                return open_engine(self.path, self.manifest.graph_hash(graph), graph, self.sizes)
        tensorrt = None
        if provider == "ort-tensorrt":
            hash, longest = self.manifest.graph_hash(graph), self.manifest.tokenizer.max_length
            tensorrt = provider_options(graph, self.sizes, graph_hash=hash, max_text_length=longest)
        try:
            return OnnxSession(self.path / graph.file, graph, self.sizes, provider=provider, threads=threads, tensorrt=tensorrt)
        except BundleError as error:
            if self.origin is None or "External data path" not in str(error):
                raise
            # 1.24 to 1.27 at least; github.com/microsoft/onnxruntime/issues/27353
            raise BundleError(
                f"{self.origin}: the installed onnxruntime cannot read weights through the links of the hub's cache; upgrade it, or "
                "load a copy: "
                f"cp -rL {self.path} BUNDLE"
            ) from error

    def text_encoder(self) -> TextEncoder:
        return TextEncoder(self.path / self.manifest.tokenizer.file, self.manifest.tokenizer)


def bundle_folder(source: str | os.PathLike[str]) -> Path:
    """The folder of the bundle `source`: itself, or for "hf://OWNER/NAME[@REVISION]" the copy in the hub's cache, with what it lacks
    downloaded. Raises what `hub.fetch` does; a folder is not looked at."""
    if not is_reference(source):
        return Path(source)
    from .hub import fetch  # only here, since it brings a client with it

    return fetch(source, _files_to_load)


def _files_to_load(root: Path) -> tuple[FileEntry, ...]:
    """What a bundle's manifest names, where it is sound and names nothing that no bundle loads."""
    manifest = _read_manifest(root)
    _check_contents(root / MANIFEST_FILE, manifest)
    loaded = {manifest.tokenizer.file, *(name for graph in manifest.graphs for name in graph_files(graph))}
    for entry in manifest.files:
        plain = "/" not in entry.path and entry.path.endswith((".onnx", ".onnx.data", ".json"))
        if entry.path not in loaded or not plain:
            raise BundleError(f"{root / MANIFEST_FILE}: lists {entry.path!r}, which is no file of a bundle; do not use this bundle")
    return manifest.files


def build_file_entries(directory: str | os.PathLike[str]) -> tuple[FileEntry, ...]:
    """Path, size and SHA-256 of every file below `directory` but the manifest and the export's report, sorted by path.

    Raises BundleError for a link, since what it points at does not travel with the bundle.
    """
    root = Path(directory)
    entries = []
    for file in sorted(root.rglob("*")):
        if file.is_symlink():
            raise BundleError(f"{file}: a symbolic link, which a bundle cannot hold; put a copy of its file there")
        name = file.relative_to(root).as_posix()
        if file.is_file() and name not in (MANIFEST_FILE, *REPORT_FILES):
            entries.append(FileEntry(path=name, size=file.stat().st_size, sha256=sha256_of(file)))
    return tuple(sorted(entries, key=lambda entry: entry.path))


def _read_manifest(root: Path) -> BundleManifest:
    """Without the entries of the report, which older exports listed."""
    manifest = read_schema(BundleManifest, root / MANIFEST_FILE, "no bundle here", "dqe-export")
    return msgspec.structs.replace(manifest, files=tuple(entry for entry in manifest.files if entry.path not in REPORT_FILES))


M = TypeVar("M", BundleManifest, HeadsManifest)


def read_schema(kind: type[M], where: Path, missing: str, made_by: str) -> M:
    """`read_document` of a bundle's or of heads. `missing`: what to say where it is not; `made_by`: the remedy."""
    try:
        manifest = read_document(kind, where, remedy="export again, or copy the folder again", error=BundleError)
    except (FileNotFoundError, NotADirectoryError) as error:
        found = f", and this is {other}" if (other := describe_folder(where.parent)) else ""
        raise BundleError(f"{where.parent}: {missing} ({where.name} is missing{found}); make one with {made_by}") from error
    if manifest.schema_version < ROW_INT8_SCHEMA and manifest.precision == "int8":
        message = "is of a scheme whose answers depended on the processor and on the batch; export again, and index again"
        raise BundleError(f"{where}: int8 of schema version {manifest.schema_version} {message}")
    return manifest


def _check_contents(where: Path, manifest: BundleManifest) -> None:
    graphs = {graph.name: graph for graph in manifest.graphs}
    for known in graphs_of(manifest.sizes):
        if graphs.get(known.name) != known:
            problem = "has other inputs or outputs than this version expects" if known.name in graphs else "is missing"
            raise BundleError(f"{where}: graph {known.name} {problem}; export the bundle again")
    paths = [entry.path for entry in manifest.files]
    if len(set(paths)) != len(paths):
        raise BundleError(f"{where}: lists a file twice; export the bundle again")
    for needed in (*(graph.file for graph in manifest.graphs), manifest.tokenizer.file):
        if needed not in paths:
            raise BundleError(f"{where}: {needed} is not in the list of files, so it cannot be verified; export the bundle again")
    sizes, heads = manifest.sizes, len(manifest.vocabulary.attributes)
    if sizes.attributes != heads:
        raise BundleError(f"{where}: {sizes.attributes} attribute heads, but {heads} attributes in the vocabulary; export the bundle again")
    if sizes.image_size != manifest.preprocessing.image_size:
        given = manifest.preprocessing.image_size
        raise BundleError(f"{where}: graphs take images of {sizes.image_size} px, preprocessing makes {given} px; export the bundle again")
    if ATTRIBUTE_HEADS.name in graphs and not heads:
        raise BundleError(f"{where}: lists a graph of attribute heads, but no attributes; export the bundle again")
    if min(msgspec.structs.astuple(msgspec.structs.replace(sizes, attributes=1))) < 1:
        raise BundleError(f"{where}: sizes must be at least 1 (attributes may be 0), got {sizes}; export the bundle again")


def check_file(root: Path, entry: FileEntry, *, hashed: bool, listed_in: str = MANIFEST_FILE) -> None:
    """Raises BundleError for an entry that leaves `root`, or a file that is not as the entry says.

    Where `root` is a snapshot in the hub's cache, its links to files of that cache count as inside, and are hashed in any case.
    """
    relative = PurePosixPath(entry.path)
    plain = entry.path == str(relative) and "\\" not in entry.path and "\0" not in entry.path
    file = root / relative if plain else root
    inside, linked, snapshot = file.resolve().is_relative_to(root.resolve()), False, Snapshot.at(root)
    if plain and not inside and snapshot is not None:
        inside = linked = snapshot.links(file)
    if not plain or relative.is_absolute() or ".." in relative.parts or not inside:
        raise BundleError(f"{root / listed_in}: {entry.path!r} is outside the bundle or not a plain path; do not use this bundle")
    again = f"remove {snapshot.repository}, and load it again" if linked and snapshot else "copy the bundle again"
    try:
        if not file.is_file():
            raise BundleError(f"{file}: missing from the bundle; {again}")
        if (size := file.stat().st_size) != entry.size:
            raise BundleError(f"{file}: {size} bytes, the manifest says {entry.size}; {again}")
        if (hashed or linked) and sha256_of(file) != entry.sha256:
            raise BundleError(f"{file}: its bytes changed since export (SHA-256 differs); {again}")
    except OSError as error:
        raise BundleError(describe_os_error(error, file)) from error
