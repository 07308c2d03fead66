"""Pages that are made from code: options from `--help`, the API from docstrings."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

from .pages import ROOT

WIDTH = 80
"""Characters of a line of `--help`."""
API = {
    "api/engine.md": (
        "engine and queries",
        "Load a bundle, index images, search. Everything here is imported from `dqe_engine`, or from the module that is named.",
        ["dqe_engine.engine.RetrievalEngine", "dqe_engine.query.Query", "dqe_engine.results", "dqe_engine.dialogue.Dialogue",
         "dqe_engine.batching.Batcher", "dqe_engine.bundle.Bundle", "dqe_engine.image_policy.ImagePolicy"],
    ),
    "api/gallery-index.md": (
        "the index",
        "An index as a value in Python: items, metadata, filters, saves.",
        ["dqe_engine.index.gallery.GalleryIndex", "dqe_engine.index.filters.compile_filter",
         "dqe_engine.index.metadata_file.read_metadata"],
    ),
    "api/zones.md": (
        "search, zones and mining",
        "The kernels without a model: any vectors, NumPy arrays in and out.",
        ["dqe_engine.zones.select.select_zones", "dqe_engine.zones.mining.mine_negatives", "dqe_engine.contracts.zones.ZoneSpec",
         "dqe_engine.zones.screen.Screen", "dqe_engine.zones.request.ZoneSelection", "dqe_engine.zones.mining.MinedNegatives",
         "dqe_engine.zones.pooled.resolve_pooled"],
    ),
    "api/client.md": (
        "the HTTP client",
        "The client of `dqe-serve`, with the extra `client`.",
        ["dqe_engine.client.Client", "dqe_engine.client.AsyncClient", "dqe_engine.client.ServerError"],
    ),
    "api/losses.md": (
        "losses",
        "Plain functions of tensors; [the method](../method.md) has their equations. They come with the extra `train`.",
        [f"dqe_training.losses.{path.stem}" for path in sorted((ROOT / "training/dqe_training/losses").glob("[!_]*.py"))],
    ),
    "api/errors.md": ("errors", "What is raised; every message is one line.", ["dqe_engine.errors"]),
}  # fmt: skip
"""Title, what it is, and the documented objects, by place."""


def api_pages() -> dict[str, str]:
    return {
        name: f"# Python: {title}\n\n{about}\n\n" + "\n".join(f"::: {identifier}" for identifier in identifiers) + "\n"
        for name, (title, about, identifiers) in API.items()
    }


def commands() -> list[list[str]]:
    """Every command and sub-command, as one would type it."""
    from dqe_engine.cli.index_tools import TOOLS

    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    found = []
    for script in scripts:
        found.append([script])
        if script == "dqe-index":
            found += [[script, tool] for tool in TOOLS]
        if script == "dqe-data":
            found += [[script, name] for name in _sub_commands(scripts[script])]
    return found


def _sub_commands(entry: str) -> list[str]:
    import argparse
    from importlib import import_module

    parser = import_module(entry.partition(":")[0]).build_parser()
    return [name for action in parser._actions if isinstance(action, argparse._SubParsersAction) for name in action.choices]


def help_of(command: list[str]) -> str:
    """What a command of this environment prints for `--help`."""
    environment = {**os.environ, "COLUMNS": str(WIDTH), "NO_COLOR": "1"}
    program = Path(sys.executable).with_name(command[0])
    done = subprocess.run([program, *command[1:], "--help"], capture_output=True, text=True, env=environment, check=True)
    return done.stdout


def commands_page() -> str:
    """Each command's own `--help`."""
    parts = ["# Options of every command", "Made from `--help` when this site was built. [Commands](commands.md) has an example of each."]
    parts += [f"{'#' * (1 + len(command))} {' '.join(command)}\n\n```text\n{help_of(command).strip()}\n```" for command in commands()]
    return "\n\n".join(parts) + "\n"
