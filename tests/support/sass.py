"""Machine code of CUDA kernels, as `cuobjdump --dump-sass` prints it: loops, and how many instructions a path through them takes."""

from __future__ import annotations

import heapq
import itertools
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

_FUNCTION = re.compile(r"\s*Function : (\S+)")
_INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;\s*/\*")
_BRANCH = re.compile(r"(?:(@!?U?P\w+)\s+)?BRA\b(?!\.DIV).*?0x([0-9a-f]+)$")  # BRA.DIV is for lanes that went separate ways
_END = re.compile(r"(@!?U?P\w+\s+)?(EXIT|RET)\b")


def disassembler() -> str | None:
    """`cuobjdump`: on PATH, in CUDA's folder, or in the wheel of Triton. None where there is none."""
    found = shutil.which("cuobjdump")
    candidates = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "cuobjdump"]
    if (triton := find_spec("triton")) and triton.submodule_search_locations:
        candidates.append(Path(triton.submodule_search_locations[0]) / "backends" / "nvidia" / "bin" / "cuobjdump")
    return found or next((str(path) for path in candidates if path.is_file()), None)


@dataclass(frozen=True)
class Kernel:
    """One function. Addresses ascend; an instruction is its text, with the predicate."""

    name: str
    addresses: Sequence[int]
    text: dict[int, str]

    def where(self, pattern: str, first: int = 0, last: int = 1 << 60) -> list[int]:
        return [a for a in self.addresses if first <= a <= last and re.search(pattern, self.text[a])]

    def loops(self) -> list[tuple[int, int]]:
        """First and last instruction of each loop, the shortest first."""
        found = [(int(m[2], 16), a) for a in self.addresses if (m := _BRANCH.search(self.text[a])) and int(m[2], 16) <= a]
        return sorted(found, key=lambda loop: loop[1] - loop[0])

    def innermost(self, pattern: str) -> tuple[int, int]:
        """The smallest loop that has all instructions of that pattern."""
        wanted = self.where(pattern)
        return next(loop for loop in self.loops() if wanted and loop[0] <= wanted[0] and wanted[-1] <= loop[1])

    def around(self, inner: tuple[int, int]) -> tuple[int, int]:
        """The next larger loop."""
        return next(loop for loop in self.loops() if loop != inner and loop[0] <= inner[0] and inner[1] <= loop[1])

    def shortest(self, first: int, last: int, through: Sequence[int] = ()) -> int:
        """Instructions on the shortest path from `first` to `last`, both counted, that passes `through` in that order."""
        stops = [first, *through, last]
        return 1 + sum(self._steps(a, b) for a, b in itertools.pairwise(stops))

    def _steps(self, start: int, goal: int) -> int:
        following = dict(itertools.pairwise(self.addresses))
        queue, done = [(0, start)], set[int]()
        while queue:
            steps, at = heapq.heappop(queue)
            if at == goal:
                return steps
            if at in done:
                continue
            done.add(at)
            text = self.text[at]
            branch, ends = _BRANCH.search(text), _END.match(text)
            targets = [int(branch[2], 16)] if branch else []
            if not (branch and not branch[1]) and not (ends and not ends[1]):
                targets.append(following[at])
            for target in targets:
                heapq.heappush(queue, (steps + 1, target))
        raise AssertionError(f"{self.name}: no path from {start:#x} to {goal:#x}")


def kernels(dump: str) -> list[Kernel]:
    """Those of a dump, with their names as C++ has them."""
    functions: dict[str, dict[int, str]] = {}
    text: dict[int, str] = {}
    for line in dump.splitlines():
        if found := _FUNCTION.match(line):
            text = functions.setdefault(found[1], {})
        elif found := _INSTRUCTION.match(line):
            text[int(found[1], 16)] = found[2]
    names = subprocess.run(["c++filt"], input="\n".join(functions), check=True, capture_output=True, text=True).stdout.splitlines()
    return [Kernel(name, sorted(text), text) for name, text in zip(names, functions.values(), strict=True)]


def dumped(program: str, compiled: Path) -> str:
    return subprocess.run([program, "--dump-sass", str(compiled)], check=True, capture_output=True, text=True).stdout
