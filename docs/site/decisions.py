"""docs/decisions.md is written in the order of time; the site shows it by area, with a heading for each decision."""

from __future__ import annotations

import re

NOT_SORTED = "Not sorted yet"
_ROW = re.compile(r"^\| (?P<area>[^|]+) \| (?P<numbers>[\d, –]+) \|$", re.MULTILINE)
_START = re.compile(r"^(\d+)\. ", re.MULTILINE)
_TITLE = re.compile(r"\*\*(.+?)\*\*(.*)", re.DOTALL)


def areas(text: str) -> dict[str, list[int]]:
    """Numbers by area, from the table at the page's top."""
    found: dict[str, list[int]] = {}
    for row in _ROW.finditer(text):
        for part in row["numbers"].split(", "):
            first, _, last = part.partition("–")
            found.setdefault(row["area"], []).extend(range(int(first), int(last or first) + 1))
    return found


def paragraphs(text: str) -> dict[int, str]:
    """Markdown by number, without the number and its indentation."""
    starts = [*_START.finditer(text)]
    ends = [*(start.start() for start in starts[1:]), len(text)]
    found = {}
    for start, end in zip(starts, ends, strict=True):
        body = re.split(r"^## ", text[start.end() : end], maxsplit=1, flags=re.MULTILINE)[0]  # headings divide by time
        body = re.sub(r"<!--.*?-->", "", body, flags=re.DOTALL)
        found[int(start[1])] = re.sub(r"^ +", "", body, flags=re.MULTILINE).strip()
    return found


def by_area(text: str) -> str:
    """The page, sorted. A number that the table lacks stands under `NOT_SORTED`, at the end."""
    decided, sorted_by = paragraphs(text), areas(text)
    listed = {number for numbers in sorted_by.values() for number in numbers}
    groups = {**sorted_by, NOT_SORTED: [number for number in decided if number not in listed]}
    parts = [
        "# Decisions\n\nWhere the work took another way than the first design, or chose among several. Numbers are in the order of time."
    ]
    for area, numbers in groups.items():
        if numbers:
            parts.append(f"## {area}")
        for number in numbers:
            title = _TITLE.match(decided[number])
            heading, rest = (title[1], title[2]) if title else ("Replaced", decided[number])
            body = rest if heading.endswith(".") or title is None else heading + rest  # where the sentence goes on, it stands whole
            parts.append(f"### {number}. {heading.rstrip('.')} {{ #d{number} }}\n\n{body.strip()}".rstrip())
    return "\n\n".join(parts) + "\n"
