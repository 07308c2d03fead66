"""Write the site's pages and configuration, of which mkdocs makes the site: `python -m docs.site build/pages`."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from .configuration import configuration
from .decisions import by_area, with_anchors
from .generated import api_pages, commands_page
from .pages import ROOT, collect, place


def write(folder: Path) -> None:
    """Everything that the site is made of, in a folder that is made anew. Raises FileNotFoundError for a link to no file."""
    shutil.rmtree(folder, ignore_errors=True)
    pages, files = collect()
    pages = {name: with_anchors(text) for name, text in pages.items()}
    pages["index.md"] = f"---\nhide: [navigation]\n---\n\n{pages['index.md']}"  # it stands alone in its menu
    pages["decisions.md"] = by_area(pages["decisions.md"])
    pages["options.md"] = commands_page()
    pages |= api_pages()
    for file in files:
        target = folder / "docs" / place(file)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, target)
    for name, text in pages.items():
        target = folder / "docs" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    (folder / "mkdocs.yml").write_text(configuration(), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m docs.site FOLDER")
    write(Path(sys.argv[1]))
