"""docs/decisions.md is written in the order of time; the site shows it by area, with a heading for each decision."""

from __future__ import annotations

import re

NOT_SORTED = "Not sorted yet"
_ROW = re.compile(r"^\| (?P<area>[^|]+) \| (?P<numbers>[\d, –]+) \|$", re.MULTILINE)
_START = re.compile(r"^(\d+)\. ", re.MULTILINE)
_TITLE = re.compile(r"\*\*(.+?)\*\*(.*)", re.DOTALL)
_MENTION = re.compile(r"(?<!\[)\b[Dd]ecision (\d+)\b(?!\])")
_LINK = re.compile(r"\[decision (\d+)\]\(([^)#]*decisions\.md)\)")


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
    areas_shown = [(area, f"area-{at}", numbers) for at, (area, numbers) in enumerate(groups.items(), 1) if numbers]
    rows = [f"| [{area}](#{anchor}) | {len(numbers)} |" for area, anchor, numbers in areas_shown]
    parts = [
        "# Decisions\n\nA decision says why the code is as it is: "
        "where the work took another way than the first design, or chose among several. "
        "Numbers are in the order of time, and a later decision may replace an earlier one. "
        "You need none of them to use the package; read them before you change a part.",
        "\n".join(["| area | decisions |", "|---|---:|", *rows]),
    ]
    for area, anchor, numbers in areas_shown:
        parts.append(f"## {area} {{ #{anchor} }}")
        for number in numbers:
            title = _TITLE.match(decided[number])
            heading, rest = (title[1], title[2]) if title else ("Replaced", decided[number])
            body = rest if heading.endswith(".") or title is None else heading + rest  # where the sentence goes on, it stands whole
            body = _MENTION.sub(lambda said: f"[{said[0]}](#d{said[1]})" if int(said[1]) in decided else said[0], body)
            parts.append(f"### {number}. {heading.rstrip('.')} {{ #d{number} }}\n\n{body.strip()}".rstrip())
    return "\n\n".join(parts) + "\n"


def with_anchors(text: str) -> str:
    """A page whose links named "decision N" lead to that decision's heading: in the repository, the page has no anchors."""
    return _LINK.sub(r"[decision \1](\2#d\1)", text)
