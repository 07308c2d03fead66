"""The site's mkdocs.yml: what docs/site/mkdocs.yml says, with the pages in the order of docs/README.md."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from .generated import API
from .pages import ROOT, linked, place

PLAN, EXAMPLES = PurePosixPath("docs/README.md"), PurePosixPath("docs/examples/README.md")
_HEADING = re.compile(r"^## ([^:\n]+)")
_ROW = re.compile(r"^\| \[([^\]]+)\]\(([^)#]+)\) \|", re.MULTILINE)


def navigation() -> dict[str, list[tuple[str, str]]]:
    """Title and place of each page, by kind: the tables of docs/README.md, without the rows that lead into a page, and the examples."""
    found: dict[str, list[tuple[str, str]]] = {}
    for section in re.split(r"^(?=## )", (ROOT / PLAN).read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        heading = _HEADING.match(section)
        assert heading is not None
        found[heading[1].strip()] = _rows(PLAN, section)
        if heading[1].startswith("Tutorial"):
            found["Examples"] = [("Overview", place(EXAMPLES)), *_rows(EXAMPLES, (ROOT / EXAMPLES).read_text(encoding="utf-8"))]
    found["Reference"][1:1] = [("Options of every command", "options.md")]
    found["Reference"] += [(f"Python: {title}", name) for name, (title, _, _) in API.items()]
    return found


def _rows(page: PurePosixPath, text: str) -> list[tuple[str, str]]:
    """Title and place of what a table's rows begin with."""
    paths = [(title, linked(page, target)) for title, target in _ROW.findall(text)]
    return [(title, place(path)) for title, path in paths if path is not None]


def configuration() -> str:
    lines = [f"INHERIT: {ROOT / 'docs/site/mkdocs.yml'}", "docs_dir: docs", "nav:", "  - Home: index.md"]
    for kind, pages in navigation().items():
        lines += [f"  - {kind}:", *(f"    - {title!r}: {name}" for title, name in pages)]
    return "\n".join(lines) + "\n"
