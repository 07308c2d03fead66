"""`dqe-import` of files of the published layouts and sizes, with random weights: time, memory, and the file's own size.

    python -m benchmarks.import_full_size sprc:vit-g qure:vit-l lavis:vit-g

Random weights take as long to import as trained ones. Needs up to 11 GB of disk.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import machine, report

_ROOT = Path(__file__).parent
_TESTS = _ROOT.parent / "tests"
_PACKAGES = ("torch", "transformers", "safetensors")
LAYOUTS, TOWERS = ("lavis", "sprc", "spn4cir", "qure"), ("vit-g", "vit-l")
# In a process of its own: what writing took is not the import's. The layouts are the tests', which hold imports against them.
_WRITE = """
import sys
from pathlib import Path
from support.published_models import VIT_G, VIT_L, save, write_vocabulary
layout, tower, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
size = {"vit-g": VIT_G, "vit-l": VIT_L}[tower]
save(layout, folder / "source.pt", size, half_tower=layout == "lavis")
write_vocabulary(folder / "vocab.txt", size.words)
"""


def measure(layout: str, tower: str, folder: Path) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": str(_TESTS)}
    subprocess.run([sys.executable, "-c", _WRITE, layout, tower, str(folder)], check=True, env=environment)
    source, out = folder / "source.pt", folder / "out"
    program = Path(sys.executable).parent / "dqe-import"
    command = [str(program), str(source), str(out), "--format", layout, "--tokenizer", str(folder / "vocab.txt")]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=sys.stderr)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if code := os.waitstatus_to_exitcode(status):
        raise subprocess.CalledProcessError(code, command)
    return {
        "layout": layout, "tower": tower, "seconds": seconds, "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_bytes": usage.ru_maxrss * 1024, "file_bytes": source.stat().st_size,
        "checkpoint_bytes": sum(file.stat().st_size for file in out.rglob("*") if file.is_file()),
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="import_full_size", description=__doc__.splitlines()[0] if __doc__ else None)
    choices = [f"{layout}:{tower}" for layout in LAYOUTS for tower in TOWERS]
    usual = ["sprc:vit-g", "qure:vit-l", "lavis:vit-g"]
    parser.add_argument("models", nargs="*", metavar="LAYOUT:TOWER", default=usual, help=f"of {', '.join(choices)}")
    parser.add_argument("--folder", type=Path, help="where the files are written (default: the system's temporary folder)")
    parser.add_argument("--out", type=Path, default=_ROOT / "results" / machine.slug(), help="folder for results")
    options = parser.parse_args(arguments)
    if unknown := sorted(set(options.models) - set(choices)):
        parser.error(f"unknown {', '.join(unknown)}; expected some of {', '.join(choices)}")
    rows, path = [], options.out / "import.json"
    for model in options.models:
        layout, tower = model.split(":")
        started, before = datetime.now(UTC), machine.load_average()
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            found = measure(layout, tower, Path(folder))
        record = report.load(path, "import")
        record["sections"][model] = found | {
            "started": started.isoformat(timespec="seconds"), "load_before": before, "load_after": machine.load_average(),
            "machine": machine.describe(_PACKAGES),
        }  # fmt: skip
        report.save_json(path, record)
        memory = found["peak_bytes"] / found["file_bytes"]
        rows.append([model, report.size(found["file_bytes"]), f"{found['seconds']:.0f}", f"{found['cpu_seconds']:.0f}", f"{memory:.2f}"])
    print(report.table(["file", "size", "seconds", "CPU seconds", "peak memory, times the file"], rows))
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
