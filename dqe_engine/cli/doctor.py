"""`dqe-doctor`: what this machine is, and what of GPU, driver, CUDA, TensorRT, providers and kernels works on it, as a table or as JSON.

The JSON is one object: `dqe_engine` (our version), `ok` (nothing is broken), `machine` (the record that `dqe_engine.doctor.description`
describes key by key) and `findings` (in order; of each its `section`, `name`, `status`, `found`, `remedy` or null, and `facts`).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .main import run

if TYPE_CHECKING:
    from dqe_engine.doctor import Description, Finding

EXIT_BROKEN = 1
_STYLES: Mapping[str, str] = {"ok": "green", "not installed": "dim", "not available": "dim", "broken": "bold red"}
_WIDTH_IN_FILES = 140


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dqe-doctor",
        description="Find out what works on this machine, each by a small self-check, and what to do about the rest.",
        epilog="Exit code 0: all that is installed works; 1: something is broken; 2: wrong arguments.",
    )
    parser.add_argument(
        "bundle", type=Path, nargs="?", help="an exported model, or hf://OWNER/NAME@REVISION: its files are verified, its graphs run once"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run(lambda: _doctor(build_parser().parse_args(argv)))


def _doctor(args: argparse.Namespace) -> int:
    from dqe_engine.doctor import all_findings, describe, examine
    from dqe_engine.errors import InputError
    from dqe_engine.hub_paths import is_reference

    bundle: Path | None = args.bundle
    if bundle is not None and is_reference(bundle):
        from dqe_engine.bundle import bundle_folder  # not for a folder: what it imports may be what is broken

        bundle = bundle_folder(bundle)
    if bundle is not None and not bundle.is_dir():
        raise InputError(f"{bundle}: not a directory; give a bundle's folder, or hf://OWNER/NAME@REVISION")
    examination = examine(str(bundle) if bundle else None)
    description = describe(examination)
    broken = [finding for finding in all_findings(examination) if finding.status == "broken"]
    if args.json:
        print(json.dumps(_as_json(description, examination, ok=not broken), indent=2))
    else:
        _print_table(description, examination, broken=len(broken))
    return EXIT_BROKEN if broken else 0


def _as_json(description: Description, examination: Mapping[str, Sequence[Finding]], *, ok: bool) -> dict[str, object]:
    from dqe_engine import __version__

    findings = [{"section": section} | dataclasses.asdict(finding) for section, found in examination.items() for finding in found]
    return {"dqe_engine": __version__, "ok": ok, "machine": description, "findings": findings}


def _print_table(description: Description, examination: Mapping[str, Sequence[Finding]], *, broken: int) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from dqe_engine.doctor import first_lines

    console = Console(width=None if sys.stdout.isatty() else _WIDTH_IN_FILES)
    table = Table.grid(padding=(0, 2))
    for _ in range(2):
        table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for section, findings in examination.items():
        if table.row_count:
            table.add_row()
        table.add_row(Text(section, style="bold"))
        for finding in findings:
            style = _STYLES[finding.status]
            table.add_row(Text(f"  {finding.name}"), Text(finding.status, style=style), Text(finding.found))
            if finding.remedy:
                table.add_row("", "", Text(f"→ {finding.remedy}", style="yellow" if finding.status == "broken" else "dim"))
    total = sum(map(len, examination.values()))
    with console.capture() as printed:
        for line in first_lines(description):
            console.print(Text(line), soft_wrap=True)
        console.print("", table, "", sep="\n")
        if broken:
            summary = f"{broken} of {total} checks found something broken; what to do stands after the arrows"
            console.print(Text(summary, style="bold red"))
        else:
            console.print(Text("all that is installed works", style="bold green"))
    text = "".join(f"{line.rstrip()}\n" for line in printed.get().splitlines())  # no padding: reports are pasted into issues
    sys.stdout.write(text)
