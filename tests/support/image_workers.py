"""Processes of their own that decode hostile images: `python -m support.image_workers costs FOLDER | fuzz SEED COUNT`, JSON out."""

from __future__ import annotations

import json
import os
import resource
import sys
import traceback
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

from dqe_engine.contracts.preprocessing import PreprocessingSpec
from dqe_engine.errors import InputError
from dqe_engine.preprocessing import fit_image, open_image

from .hostile_images import mutated, ordinary_images

SPEC = PreprocessingSpec(image_size=64, fit="target_pad_crop")
_ADDRESS_SPACE = 3 << 30


def decode(source: Path | bytes) -> str:
    """What came of it: "taken", the reason it was refused for, or a traceback."""
    try:
        fit_image(open_image(source, SPEC), SPEC)
    except InputError as error:
        return f"refused: {error}"
    except BaseException:
        return traceback.format_exc()
    return "taken"


def costs(folder: Path) -> dict[str, tuple[float, str]]:
    """Per file of the folder: MiB by which the peak of a process that decodes it is above one that does nothing; what came of it."""
    for source in ordinary_images():
        decode(source)  # so that every decoder is loaded
    idle, _ = _peak(lambda: "")
    found = {}
    for file in sorted(folder.iterdir()):
        peak, said = _peak(lambda file=file: decode(file))
        found[file.name] = (peak - idle) / 1024, said
    return found


def _peak(work: object) -> tuple[int, str]:
    """KiB of a fork that does the work, and what it returned."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, work().encode()[:60_000])
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as stream:
        said = stream.read().decode()
    _, status, usage = os.wait4(child, 0)
    return usage.ru_maxrss, said if status == 0 else f"killed: {status}"


def fuzz(seed: int, count: int) -> dict[str, object]:
    """Tracebacks, how many mutated images were taken, and MiB by which the process grew from a quarter of them to the end."""
    rng, sources, failures, taken, early = np.random.default_rng(seed), ordinary_images(), [], 0, 0
    for number in range(count):
        said = decode(mutated(sources[int(rng.integers(len(sources)))], rng))
        taken += said == "taken"
        if said != "taken" and (not said.startswith("refused: <") or "\n" in said):
            failures.append(said)
        if number == count // 4:
            early = resident()
    return {"failures": failures, "taken": taken, "grown": resident() - early, "peak": resident("VmHWM")}


def resident(which: str = "VmRSS") -> int:
    """MiB. `getrusage` would count what the parent had before this process began."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{which}:"))
    return int(line.split()[1]) >> 10


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    Image.init()
    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE, _ADDRESS_SPACE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.argv[1] == "costs":
        print(json.dumps(costs(Path(sys.argv[2]))))
    else:
        print(json.dumps(fuzz(int(sys.argv[2]), int(sys.argv[3]))))
