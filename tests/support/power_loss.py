"""What a disk may hold after the power fails: every state that a log of `disk_calls.c` allows.

The model is stricter than file systems are. Until a file is synced, each of its writes may be there, or not, or have left zeros. Until
a folder is synced, each name made, moved or removed in it may be as it was, in whatever combination. Only a rename is atomic; one from
folder to folder is there when either of them is synced.
"""

from __future__ import annotations

import itertools
import math
import random
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

SOURCE = Path(__file__).with_name("disk_calls.c")
MOST_STATES = 48  # of one moment; where there are more, the extreme ones and a sample

Change = tuple[str, int, bytes]  # write at, or cut to, an offset
Naming = tuple[int, dict[int, tuple[str | None, str | None]]]  # by folder, an inode loses the first name there and takes the second


def build_recorder(folder: Path) -> Path:
    library = folder / "disk_calls.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", str(library), str(SOURCE), "-ldl"], check=True)
    return library


@dataclass
class Disk:
    """`files` and `names` are sure; `changes` and `namings` may or may not be there. All by inode."""

    root: str
    number: int
    files: dict[int, bytes] = field(default_factory=dict)
    changes: dict[int, list[Change]] = field(default_factory=dict)
    names: dict[int, dict[str, int]] = field(default_factory=dict)  # of folders
    namings: list[Naming] = field(default_factory=list)
    places: dict[str, int] = field(default_factory=dict)  # folders by the path that they have now
    folders: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.places[self.root] = self.number
        self.folders.add(self.number)

    def apply(self, call: str, inode: int, rest: str) -> None:
        if call == "write":
            offset, _, digits = rest.partition(" ")
            self.changes.setdefault(inode, []).append(("write", int(offset), bytes.fromhex(digits)))
        elif call == "truncate":
            self.changes.setdefault(inode, []).append(("cut", int(rest), b""))
        elif call == "sync" and inode in self.folders:
            sure = [naming for naming in self.namings if inode in naming[1]]
            self.namings = [naming for naming in self.namings if inode not in naming[1]]
            self.names = named(self.names, sure)
        elif call == "sync":
            self.files[inode] = written(self.files.get(inode, b""), self.changes.pop(inode, []))
        else:
            old, _, new = rest.partition("\t") if call == "rename" else ("", "", rest)
            if call in ("create", "mkdir"):
                self.files[inode] = b""
            if call == "mkdir":
                self.folders.add(inode)
                self.places[new] = inode
            if call == "rename" and inode in self.folders:
                moved = {path: place for path, place in self.places.items() if path == old or path.startswith(f"{old}/")}
                for path in moved:
                    del self.places[path]
                self.places |= {new + path[len(old) :]: place for path, place in moved.items()}
            there: dict[int, tuple[str | None, str | None]] = {}
            if call == "unlink":
                there[self._folder(new)] = (Path(new).name, None)
            else:
                there[self._folder(new)] = (None, Path(new).name)
            if old:
                _, taken = there.get(self._folder(old), (None, None))
                there[self._folder(old)] = (Path(old).name, taken)
            self.namings.append((inode, there))

    def _folder(self, path: str) -> int:
        return self.places[str(Path(path).parent)]

    def states(self, rng: random.Random) -> Iterator[dict[str, bytes | None]]:
        """By path: the bytes of a file, None for a folder."""
        flat: list[tuple[int, ...]] = []  # 0: not there; 1: there; 2: zeros are
        flat += [(0, 1, 2) if kind == "write" else (0, 1) for changes in self.changes.values() for kind, *_ in changes]
        flat += [(0, 1) for _ in self.namings]
        if math.prod(map(len, flat)) <= MOST_STATES:
            picks = list(itertools.product(*flat))
        else:
            picks = [tuple(0 for _ in flat), tuple(1 for _ in flat)]
            for at in range(len(flat)):  # all but one, and one alone
                picks += [tuple(int(n != at) for n in range(len(flat))), tuple(int(n == at) for n in range(len(flat)))]
            picks += [tuple(rng.choice(options) for options in flat) for _ in range(MOST_STATES)]
        for pick in picks:
            yield self._state(list(pick))

    def _state(self, pick: list[int]) -> dict[str, bytes | None]:
        files = dict(self.files)
        for inode, changes in self.changes.items():
            taken, pick = pick[: len(changes)], pick[len(changes) :]
            kept = [(kind, at, data if how == 1 else bytes(len(data))) for (kind, at, data), how in zip(changes, taken, strict=True) if how]
            files[inode] = written(files.get(inode, b""), kept)
        names = named(self.names, [naming for naming, how in zip(self.namings, pick, strict=True) if how])
        state: dict[str, bytes | None] = {}
        stack, seen = [(self.root, self.number)], {self.number}
        while stack:
            folder, number = stack.pop()
            for name, inode in names.get(number, {}).items():
                path = f"{folder}/{name}"
                if inode not in self.folders:
                    state[path] = files.get(inode, b"")
                elif inode not in seen:  # one that a lost removal left under two names is where it was found first
                    seen.add(inode)
                    state[path] = None
                    stack.append((path, inode))
        return state


def written(content: bytes, changes: list[Change]) -> bytes:
    for kind, at, data in changes:
        if kind == "cut":
            content = content[:at] + bytes(max(0, at - len(content)))
        else:
            content = content[:at] + bytes(max(0, at - len(content))) + data + content[at + len(data) :]
    return content


def named(names: dict[int, dict[str, int]], namings: list[Naming]) -> dict[int, dict[str, int]]:
    names = {folder: dict(there) for folder, there in names.items()}
    for inode, changed in namings:
        for folder, (old, new) in changed.items():
            there = names.setdefault(folder, {})
            if old is not None and there.get(old) == inode:
                del there[old]
            if new is not None:
                there[new] = inode
    return names


def crashes(log: str, rng: random.Random, root: Path) -> Iterator[tuple[tuple[str, ...], dict[str, bytes | None]]]:
    """After each call of the log: the marks so far, and a state that may be there then. No state twice with the same marks."""
    disk, marks, seen = Disk(str(root), root.stat().st_ino), tuple[str, ...](), set[int]()
    identity: dict[str, int] = {str(root.stat().st_ino): root.stat().st_ino}  # of an inode's number, which is given again
    for line in log.splitlines():
        call, _, rest = line.partition(" ")
        if call == "mark":
            marks = (*marks, rest)
        else:
            inode, _, rest = rest.partition(" ")
            if call in ("create", "mkdir"):
                identity[inode] = -1 - len(disk.files)
            disk.apply(call, identity[inode], rest)
        for state in disk.states(rng):
            key = hash((marks, tuple(sorted(state.items()))))
            if key not in seen:
                seen.add(key)
                yield marks, state


def lay_out(state: dict[str, bytes | None], root: Path, folder: Path) -> None:
    """Write a state below `folder`, where `root` was."""
    for path, content in sorted(state.items()):
        target = folder / Path(path).relative_to(root)
        if content is None:
            target.mkdir()
        else:
            target.write_bytes(content)
