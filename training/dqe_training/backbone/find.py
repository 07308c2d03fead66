"""Where a backbone lies: a directory, or a snapshot of a hub repository."""

from __future__ import annotations

import os
import re
from pathlib import Path

from dqe_engine.errors import CheckpointError, InputError

_HUB_NAME = re.compile(r"(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?")
_FILES = ("config.json", "preprocessor_config.json", "processor_config.json", "tokenizer.json", "*.safetensors", "*.safetensors.index.json")


def find_backbone(source: str) -> Path:
    """The directory of `source`: one on this machine, else "owner/name[@revision]", fetched from the hub once.

    Only configuration, tokenizer and safetensors are fetched. Raises InputError for a name of neither kind, and
    CheckpointError where the hub does not give the files and they were not fetched before.
    """
    directory = Path(os.path.expanduser(source))
    if directory.is_dir():
        return directory
    name = _HUB_NAME.fullmatch(source)
    if name is None:
        raise InputError(f"backbone {source}: no such directory; expected one, or owner/name[@revision] on the hub")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(name["repository"], revision=name["revision"], allow_patterns=list(_FILES)))
    except (OSError, HfHubHTTPError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise CheckpointError(
            f"backbone {source}: not on this machine and cannot be fetched from the hub ({reason}); connect, correct the name, "
            "or copy the repository here and give its directory"
        ) from error
