"""Which files of the repository the site shows, where each lies in it, and what their links become."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath

from .programs import page_of

ROOT = Path(__file__).parents[2]
STARTS = ("README.md", "docs/*.md", "docs/examples/*.md", ".github/CONTRIBUTING.md", ".github/SECURITY.md")
"""The pages of the site; what they link to comes with them."""
MOVED = {
    "README.md": "index.md",
    "docs/README.md": "all-pages.md",
    "docs/index.md": "the-index.md",  # `index` is the home page's name
    "docs/CHANGELOG.md": "changelog.md",
    ".github/CONTRIBUTING.md": "contributing.md",
    ".github/SECURITY.md": "security.md",
}
_TARGET = re.compile(r"(?<=\]\()[^)\s]+(?=\))")
_FENCE = re.compile(r"\s*(```|~~~)")


def is_example(path: PurePosixPath) -> bool:
    return path.parent == PurePosixPath("docs/examples") and path.suffix in (".py", ".ipynb")


def place(path: PurePosixPath) -> str:
    """Where a file of the repository lies in the site: pages of docs/ at the top, all else as it lies in the repository."""
    if str(path) in MOVED:
        return MOVED[str(path)]
    if is_example(path):
        path = path.with_suffix(".md")
    if path.is_relative_to("docs"):
        return str(path.relative_to("docs"))
    return f"repository/{path}"


def linked(page: PurePosixPath, target: str) -> PurePosixPath | None:
    """The file of the repository that a link of a page leads to; None for the page itself and for addresses elsewhere."""
    name = target.partition("#")[0]
    if not name or re.match(r"[a-z]+:", name):
        return None
    path = PurePosixPath(normpath(page.parent / name))
    if (ROOT / path).is_dir():
        path /= "README.md"
    if str(path).startswith("..") or not (ROOT / path).is_file():
        raise FileNotFoundError(f"{page} links to {target}, and there is no such file")
    return path


def map_links(text: str, change: Callable[[str], str]) -> str:
    """A page with every link's target changed, but for what stands in code."""
    lines, fenced = [], False
    for line in text.splitlines(keepends=True):
        if _FENCE.match(line):
            fenced = not fenced
        elif not fenced:
            parts = re.split(r"(`[^`]*`)", line)
            parts[::2] = [_TARGET.sub(lambda match: change(match[0]), part) for part in parts[::2]]
            line = "".join(parts)
        lines.append(line)
    return "".join(lines)


def collect() -> tuple[dict[str, str], set[PurePosixPath]]:
    """Text by place of every page that is reached, its links leading to places; and the other files that pages link to."""
    waiting = [PurePosixPath(path.relative_to(ROOT)) for pattern in STARTS for path in sorted(ROOT.glob(pattern))]
    pages: dict[str, str] = {}
    files: set[PurePosixPath] = set()
    while waiting:
        page = waiting.pop()
        if place(page) in pages:
            continue

        def change(target: str, page: PurePosixPath = page) -> str:
            path = linked(page, target)
            if path is None:
                return target
            if path.suffix == ".md" or is_example(path):
                waiting.append(path)
            else:
                files.add(path)
            _, hash_sign, anchor = target.partition("#")
            return relpath(place(path), PurePosixPath(place(page)).parent) + hash_sign + anchor

        text = page_of(ROOT / page) if is_example(page) else (ROOT / page).read_text(encoding="utf-8")
        pages[place(page)] = map_links(text, change)
    return pages, files
