"""A bundle published as a repository of models on the Hugging Face hub: its files and a model card, in one commit."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dqe_engine.bundle import Bundle
from dqe_engine.contracts.graphs import GRAPHS
from dqe_engine.contracts.manifest import MANIFEST_FILE, graph_files
from dqe_engine.errors import BundleError, InputError
from dqe_engine.hub import hub_client, hub_errors
from dqe_engine.hub_paths import check_repository

from .model_card import CARD_FILE, GENERATED, model_card


@dataclass(frozen=True)
class Pushed:
    """`commit`: the repository's newest, which `files` were added or removed in; no files where it had this bundle already."""

    repository: str
    commit: str
    files: tuple[str, ...]
    card_kept: bool

    def describe(self) -> str:
        done = f"{len(self.files)} files" if self.files else "nothing to do, the repository has this bundle"
        kept = f"; {CARD_FILE} is not ours and stays as it is" if self.card_kept else ""
        return f"hf://{self.repository}@{self.commit}  {done}{kept}"


def check_push(repository: str) -> None:
    """What can be told before there is a bundle. Raises InputError for a malformed name, BackendError without huggingface_hub,
    BundleError without a token."""
    what = f"--push {check_repository(repository)}"
    hub_client(what)
    from huggingface_hub import get_token

    if get_token() is None:
        raise BundleError(f"{what}: not logged in to the hub; log in with a token that may write: hf auth login, or HF_TOKEN")


def push_bundle(path: Path, repository: str, *, private: bool = False) -> Pushed:
    """Publish the bundle at `path`, once its files are verified, as `repository`, "OWNER/NAME", on its default branch.

    A repository that is missing is made, `private` if so wished. Only files that differ from what it has are sent. Files that only an
    earlier bundle had are removed; files that no bundle has are left alone, and so is a model card that somebody else wrote.

    Raises BundleError for a bundle that is damaged and for whatever the hub refuses, BackendError without huggingface_hub, and InputError
    for a malformed name, or where `private` is wished and the repository is public.
    """
    check_push(repository)
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    bundle = Bundle.load(path)
    what = f"--push {repository}"
    api = hub_client(what)
    with hub_errors(what, "changing"):
        head = _head(api, repository, private)
        contents: dict[str, bytes | Path] = {entry.path: bundle.path / entry.path for entry in bundle.manifest.files}
        contents[MANIFEST_FILE] = (bundle.path / MANIFEST_FILE).read_bytes()
        contents[CARD_FILE] = model_card(bundle.manifest, repository).encode()
        known = {name for graph in GRAPHS for name in graph_files(graph)}
        there = {file.path: file for file in api.get_paths_info(repository, sorted(known | set(contents)), revision=head)}
        card_kept = CARD_FILE in there and not _is_ours(api, repository, head)
        if card_kept:
            del contents[CARD_FILE]
        hashes = {entry.path: entry.sha256 for entry in bundle.manifest.files}
        hashes |= {name: hashlib.sha256(content).hexdigest() for name, content in contents.items() if isinstance(content, bytes)}
        changed = [name for name, content in contents.items() if name not in there or not _equal(there[name], content, hashes[name])]
        gone = sorted((known & set(there)) - set(contents))
        if not changed and not gone:
            return Pushed(repository, head, (), card_kept)
        operations: list[Any] = [CommitOperationAdd(name, contents[name]) for name in sorted(changed)]
        operations += [CommitOperationDelete(name) for name in gone]
        message = f"{bundle.manifest.name}, {bundle.manifest.precision}: model {bundle.model_hash[:12]}"
        commit = api.create_commit(repository, operations, commit_message=message, parent_commit=head)
    return Pushed(repository, commit.oid, (*sorted(changed), *gone), card_kept)


def _head(api: Any, repository: str, private: bool) -> str:
    """The newest commit of the repository, which is made where it is missing."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        found = api.model_info(repository)
    except RepositoryNotFoundError:
        api.create_repo(repository, private=private or None, exist_ok=True)
        found = api.model_info(repository)
    if private and not found.private:
        raise InputError(f"--private: {repository} exists and is public; change that on its page, or name another repository")
    return str(found.sha)


def _is_ours(api: Any, repository: str, head: str) -> bool:
    path = Path(api.hf_hub_download(repository, CARD_FILE, revision=head))
    return GENERATED in path.read_text(encoding="utf-8", errors="replace")


def _equal(there: Any, content: bytes | Path, sha256: str) -> bool:
    """Whether the hub has this content: by SHA-256 of large files, by git's own hash of small ones."""
    if there.lfs is not None:
        return bool(there.lfs.sha256 == sha256)
    data = content if isinstance(content, bytes) else content.read_bytes()
    return bool(there.blob_id == hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest())
