"""Bundles on the Hugging Face hub, by its own client: what a bundle's manifest names is downloaded into the client's cache.

The client, `huggingface_hub`, is imported when something is asked of the hub, and not before. It reads its own settings: HF_HOME,
HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .contracts.manifest import MANIFEST_FILE, FileEntry
from .contracts.versioned import MOST_BYTES
from .errors import BackendError, BundleError, DQEError
from .files import describe_os_error
from .hub_paths import HubReference

if TYPE_CHECKING:
    from huggingface_hub import HfApi

Doing = Literal["asking", "downloading", "changing"]

_SECONDS = 15.0
"""To wait for the hub to say which commit a revision is."""

_log = logging.getLogger(__name__)


def fetch(source: str | os.PathLike[str], files_of: Callable[[Path], Sequence[FileEntry]]) -> Path:
    """The folder in the client's cache that holds the bundle `source`, "hf://OWNER/NAME[@REVISION]", at one commit.

    `files_of`: reads and checks the manifest in that folder, and gives the files to have beside it. Those that are missing are downloaded,
    and no other, after the hub has named for each the size, and where it knows one the SHA-256, that the manifest says. A commit that is
    here whole is not asked for. Where the hub cannot be reached, what is here of the branch or tag is taken, with a warning in the log.
    Nothing is hashed here: `Bundle.load` does that.

    Raises InputError for a malformed name, BackendError without huggingface_hub, and BundleError, one line with the remedy, for a
    repository, revision or file that is not to be had.
    """
    reference = HubReference.parse(source)
    api = hub_client(str(reference))
    if _is_offline() or reference.is_commit:
        try:
            return _from_cache(api, reference, files_of)
        except FileNotFoundError as error:
            if _is_offline():
                raise BundleError(
                    f"{reference}: {error}, and HF_HUB_OFFLINE is set; unset it, and load this once with a connection"
                ) from error
    try:
        with hub_errors(str(reference)):
            commit = api.model_info(reference.repository, revision=reference.revision, timeout=_SECONDS).sha
    except HubUnreachableError as error:
        try:
            folder = _from_cache(api, reference, files_of)
        except FileNotFoundError as missing:
            raise BundleError(f"{error} ({missing})") from error
        _log.warning("%s; took commit %s, which is here", error, folder.name)
        return folder
    if not isinstance(commit, str):
        raise BundleError(f"{reference}: the hub's answer names no commit; check that HF_ENDPOINT is a hub")
    return _download(api, HubReference(reference.repository, commit), reference, files_of)


def hub_client(what: str) -> HfApi:
    """The client. Raises BackendError where it is not installed. `what` is what it is for."""
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise BackendError(f"{what}: needs huggingface_hub ({error}); pip install 'dqe-engine[hub]'") from error
    return HfApi(library_name="dqe-engine")


class HubUnreachableError(BundleError):
    """No answer from the hub, or none that is about what was asked."""


@contextlib.contextmanager
def hub_errors(what: str, doing: Doing = "asking") -> Iterator[None]:
    """Errors of the client in the block become BundleError, one line with the remedy. `what` begins the line."""
    from huggingface_hub import errors
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of the HTTP library that the client takes

    try:
        yield
    except DQEError:
        raise
    except (HTTPError, errors.EntryNotFoundError, OSError, ValueError) as error:
        kind, message = _describe(error, doing)
        raise kind(f"{what}: {message}") from error


def _describe(error: Exception, doing: Doing) -> tuple[type[BundleError], str]:
    from huggingface_hub import constants, errors, get_token

    log_in = "get a token that may, and log in with it: hf auth login, or HF_TOKEN" if get_token() else "log in: hf auth login, or HF_TOKEN"
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    said = _one_line(error)
    if isinstance(error, errors.GatedRepoError):
        return BundleError, f"gated; ask for access on its page at {constants.ENDPOINT}, then {log_in}"
    if isinstance(error, errors.RevisionNotFoundError):
        return BundleError, "the repository has no such branch, tag or commit; check the name after @, or leave it out"
    if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
        return BundleError, f"a file of the bundle is missing ({said}); it must be published again: dqe-export --push"
    if isinstance(error, errors.RepositoryNotFoundError):
        return BundleError, f"no such repository, or a private one that is not shown to you; check the name, or {log_in}"
    if status in (401, 403):
        return BundleError, f"the hub does not allow {'this change' if doing == 'changing' else 'reading it'} ({said}); {log_in}"
    if status in (409, 412):
        return BundleError, "it was changed by somebody else meanwhile; look at its page, and run the same command again"
    if status is not None and status != 429 and status < 500:
        return BundleError, f"the hub refuses ({said}); check the name and the file names"
    if isinstance(error, OSError) and error.errno and error.strerror and not isinstance(error, ConnectionError):
        return BundleError, describe_os_error(error)
    if doing == "downloading":
        return BundleError, f"the download ended early ({said}); run the same again, it goes on with what is missing"
    ready = "; once it is here, HF_HUB_OFFLINE=1 needs no hub" if doing == "asking" else ""
    return HubUnreachableError, f"the hub cannot be reached ({said}); check the connection and HF_ENDPOINT, or try later{ready}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _from_cache(api: HfApi, reference: HubReference, files_of: Callable[[Path], Sequence[FileEntry]]) -> Path:
    """The folder, where everything is in the cache. Raises FileNotFoundError, saying what is not."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    name = MANIFEST_FILE
    try:
        folder = Path(api.hf_hub_download(reference.repository, name, revision=reference.revision, local_files_only=True)).parent
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError("nothing of it is on this machine") from error
    for entry in files_of(folder):
        if not (folder / entry.path).exists():
            raise FileNotFoundError(f"{entry.path} is not on this machine")
    return folder


def _download(api: HfApi, commit: HubReference, asked: HubReference, files_of: Callable[[Path], Sequence[FileEntry]]) -> Path:
    """Everything of the bundle at a commit; `asked` is what errors call it, and whose commit the cache is to remember."""

    def get(name: str) -> Path:
        with hub_errors(f"{asked}: {name}", "downloading"):
            return Path(api.hf_hub_download(commit.repository, name, revision=commit.revision))

    offered = _offered(api, commit, asked, [MANIFEST_FILE])
    if MANIFEST_FILE not in offered:
        raise BundleError(f"{asked}: no bundle here ({MANIFEST_FILE} is missing); publish one with dqe-export --push")
    if offered[MANIFEST_FILE].size > MOST_BYTES:
        raise BundleError(
            f"{asked}: its {MANIFEST_FILE} has {offered[MANIFEST_FILE].size} bytes, at most {MOST_BYTES} are read; publish again"
        )
    folder = get(MANIFEST_FILE).parent
    entries = files_of(folder)
    missing = [entry for entry in entries if not (folder / entry.path).exists()]
    offered = _offered(api, commit, asked, [entry.path for entry in missing]) if missing else {}
    for entry in missing:
        _check_offered(asked, entry, offered.get(entry.path))
    for entry in missing:
        get(entry.path)
    if not asked.is_commit:
        with hub_errors(str(asked)):  # the cache remembers which commit the name was: nothing is downloaded
            api.hf_hub_download(asked.repository, MANIFEST_FILE, revision=asked.revision)
    return folder


def _offered(api: HfApi, commit: HubReference, asked: HubReference, names: list[str]) -> dict[str, Any]:
    """What the hub has of these files, by name."""
    with hub_errors(str(asked)):
        found = api.get_paths_info(commit.repository, names, revision=commit.revision)
    return {file.path: file for file in found if hasattr(file, "size")}


def _check_offered(asked: HubReference, entry: FileEntry, offered: Any) -> None:
    again = "it must be published again: dqe-export --push"
    if offered is None:
        raise BundleError(f"{asked}: {entry.path}, which its manifest lists, is missing; {again}")
    if offered.size != entry.size:
        raise BundleError(f"{asked}: {entry.path} has {offered.size} bytes, its manifest says {entry.size}; {again}")
    if offered.lfs is not None and offered.lfs.sha256 != entry.sha256:
        raise BundleError(f"{asked}: {entry.path} is not the file that its manifest lists (SHA-256 differs); {again}")
