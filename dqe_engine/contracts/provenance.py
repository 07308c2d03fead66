"""Where weights come from that were trained elsewhere: recorded when they are imported, kept by the bundle."""

from __future__ import annotations

from .parsing import Contract


class SourceFile(Contract, frozen=True):
    """A file as it was read: its name without a folder, bytes, SHA-256."""

    name: str
    size: int
    sha256: str


class Provenance(Contract, frozen=True):
    """An imported model: the layout of its file, such as "sprc", the files, whose licence applies, and what was made of it otherwise than
    its authors do, one sentence each."""

    format: str
    files: tuple[SourceFile, ...]
    licence: str
    deviations: tuple[str, ...] = ()
