"""The site's mkdocs.yml: what docs/site/mkdocs.yml says, with the pages in the order of docs/README.md."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from .generated import API
from .pages import ROOT, linked, place

PLAN = PurePosixPath("docs/README.md")
_HEADING = re.compile(r"^## ([^:\n]+)")
_ROW = re.compile(r"^\| \[([^\]]+)\]\(([^)#]+)\) \|", re.MULTILINE)


def navigation() -> dict[str, list[tuple[str, str]]]:
    """Title and place of each page, by kind: the tables of docs/README.md, without the rows that lead into a page."""
    found: dict[str, list[tuple[str, str]]] = {}
    for section in re.split(r"^(?=## )", (ROOT / PLAN).read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        heading = _HEADING.match(section)
        assert heading is not None
        for title, target in _ROW.findall(section):
            path = linked(PLAN, target)
            assert path is not None, target
            found.setdefault(heading[1].strip(), []).append((title, place(path)))
    found["Reference"][1:1] = [("Options of every command", "options.md")]
    found["Reference"] += [(f"Python: {title}", name) for name, (title, _, _) in API.items()]
    return found


def configuration() -> str:
    lines = [f"INHERIT: {ROOT / 'docs/site/mkdocs.yml'}", "docs_dir: docs", "nav:", "  - Home: index.md"]
    for kind, pages in navigation().items():
        lines += [f"  - {kind}:", *(f"    - {title!r}: {name}" for title, name in pages)]
    return "\n".join(lines) + "\n"
