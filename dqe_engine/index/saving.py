"""A save of an index, beside other processes that may save to the same place."""

from __future__ import annotations

from pathlib import Path

from dqe_engine.errors import IndexConflictError
from dqe_engine.files import fsync_path

from . import storage as disk
from .writer import Writer


def save(writer: Writer, root: Path, *, here: bool, overwrite: bool, compact: bool) -> bool:
    """Make the writer's rows durable in the directory `root`; whether there was anything to write.

    here: `root` is where the writer was opened from, or saved last. compact: write a new generation, of the live rows only. Raises
    IndexConflictError when `root` holds an index of others or one that another writer changed since (unless `overwrite`), and
    IndexFormatError when the disk refuses.
    """
    with disk.writing(root):
        current = disk.read_manifest_to_replace(root) if overwrite else disk.read_manifest(root)
        ours = writer.saved if here else None
        known = current is not None and ours is not None and current.revision == ours.revision
        # One that failed after its manifest had landed: what it wrote may not be on the disk, so all is written again.
        landed = current is not None and current.revision == writer.attempted
        if current is not None and not known and not landed and not overwrite:
            reason = "was changed by another writer: load it again" if ours else "holds another index: choose another path"
            raise IndexConflictError(f"{root} {reason}, or pass overwrite=True")
        if known and not writer.unsaved and not compact:
            fsync_path(root)  # whoever wrote what was loaded may have been killed before that
            return False
        disk.remove_orphans(root, keep=current)
        if known and not compact and not writer.is_sparse:
            writer.append(root)
        else:
            writer.write_generation(root)
    return True
