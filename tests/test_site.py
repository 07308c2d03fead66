"""The documentation's site: every page is in it, reads as on GitHub, names the whole API and every command, and has no dead link."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path, PurePosixPath

import pytest
from markdown_it import MarkdownIt

import dqe_engine
from docs.site.check import broken_links
from docs.site.configuration import navigation
from docs.site.decisions import areas, by_area, paragraphs, with_anchors
from docs.site.generated import commands
from docs.site.pages import collect, linked, map_links
from dqe_engine import client, errors, zones

ROOT = Path(__file__).parents[1]
COUNTED = ("h2", "h3", "table", "tr", "ul", "ol", "li", "pre", "img", "blockquote")


class Counting(HTMLParser):
    """Elements of the page's own text: on the site what lies in <article>."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in COUNTED:
            self.found[tag] += 1


@pytest.mark.slow
def test_the_site(tmp_path: Path) -> None:
    """It is built once: with several tests, each worker would build its own."""
    site = build(tmp_path)
    assert broken_links(site) == []
    assert len(list(site.rglob("*.html"))) > 40
    assert read_otherwise(site) == {}
    assert undocumented(site) == []
    helps(site)


def build(folder: Path) -> Path:
    """As `make docs` does: mkdocs ends with an error where it has a warning."""
    subprocess.run([sys.executable, "-m", "docs.site", folder / "pages"], cwd=ROOT, check=True)
    build = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "-f", folder / "pages" / "mkdocs.yml", "-d", folder / "site"]
    done = subprocess.run(build, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"})
    assert done.returncode == 0, done.stderr
    return folder / "site"


def read_otherwise(site: Path) -> dict[str, object]:
    """Pages with other numbers of headings, rows, items or blocks of code than GitHub's rules find: Python-Markdown's rules are others."""
    github = MarkdownIt("gfm-like", {"linkify": False})
    pages, _ = collect()
    differing: dict[str, object] = {}
    for name, text in pages.items():
        if name == "decisions.md":
            continue
        built = (site / re.sub(r"README\.md$", "index.md", name)).with_suffix(".html").read_text(encoding="utf-8")
        article = re.search(r"<article.*?</article>", built, re.DOTALL)
        assert article is not None, name
        here, there = Counting(article[0]).found, Counting(github.render(text)).found
        if here != there:
            differing[name] = (here - there, there - here)
    return differing


def undocumented(site: Path) -> list[str]:
    """Public names that no page of the reference has."""
    missing = []
    text = "".join(path.read_text(encoding="utf-8") for path in (site / "api").glob("*.html"))
    for module in (dqe_engine, zones, errors, client):
        names = getattr(
            module,
            "__all__",
            [name for name, value in vars(module).items() if isinstance(value, type) and value.__module__ == module.__name__],
        )
        public = [name for name in names if not name.startswith("_")]
        assert public
        missing += [f"{module.__name__}.{name}" for name in public if not re.search(rf'id="[\w.]+\.{name}"', text)]
    return missing


def helps(site: Path) -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    listed = commands()
    assert {command[0] for command in listed} == set(scripts)
    assert ["dqe-data", "check"] in listed
    assert ["dqe-index", "publish"] in listed
    text = (site / "options.html").read_text(encoding="utf-8")
    for command in listed:
        assert f'id="{"-".join(command)}"' in text
        assert f"usage: {' '.join(command)}" in text


def test_every_page_is_in_the_plan() -> None:
    planned = {name for pages in navigation().values() for _, name in pages}
    assert {"own-photos.md", "options.md", "api/engine.md", "examples/README.md"} <= planned
    pages, _ = collect()
    assert {name for name in pages if "/" not in name} - planned == {"index.md", "all-pages.md"}


def test_decisions_are_sorted_without_loss() -> None:
    text = (ROOT / "docs" / "decisions.md").read_text(encoding="utf-8")
    decided, sorted_by = paragraphs(text), areas(text)
    assert list(decided) == sorted(decided)
    assert len(decided) >= 240
    listed = Counter(number for numbers in sorted_by.values() for number in numbers)
    assert len(sorted_by) >= 10
    assert set(listed) <= set(decided)
    assert set(listed.values()) == {1}
    page = by_area(text)
    assert sorted(int(number) for number in re.findall(r"^### (\d+)\. ", page, re.MULTILINE)) == sorted(decided)
    words = [word for body in decided.values() for word in re.findall(r"\w+", body)]
    assert Counter(words) - Counter(re.findall(r"\w+", page)) == Counter()


def test_what_is_not_sorted_is_shown() -> None:
    page = by_area("# D\n\n| a | b |\n|---|---|\n| Area | 1 |\n\n1. **One.** First.\n   More.\n2. **Two**, and so on.\n")
    assert page.index("## Area") < page.index("### 1. One") < page.index("First.\nMore.") < page.index("## Not sorted yet")
    assert page.endswith("### 2. Two { #d2 }\n\nTwo, and so on.\n")
    assert "| [Area](#area-1) | 1 |" in page


def test_decisions_that_are_named_are_linked() -> None:
    page = by_area("| Area | 1, 2 |\n\n1. **One.** See decision 2, not decision 9.\n2. **Two.** End.\n")
    assert "See [decision 2](#d2), not decision 9." in page
    assert (
        with_anchors("[decision 7](../decisions.md) and [decisions](decisions.md)")
        == "[decision 7](../decisions.md#d7) and [decisions](decisions.md)"
    )


def test_links_in_code_stay() -> None:
    text = "[a](b.md) and `[c](d.md)`\n```\n[e](f.md)\n```\n[`g`](h.md#i)\n"
    assert map_links(text, lambda target: target.replace(".md", ".html")) == (
        "[a](b.html) and `[c](d.md)`\n```\n[e](f.md)\n```\n[`g`](h.html#i)\n"
    )


def test_dead_links_are_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"README.md links to docs/gone.md#x, and there is no such file"):
        linked(PurePosixPath("README.md"), "docs/gone.md#x")
    (tmp_path / "a.html").write_text('<a id="x" href="b.html#y"></a><a href="b.html#z"></a><img src="c.png"><a href="https://d.e/f"></a>')
    (tmp_path / "b.html").write_text('<p id="y"></p>')
    assert broken_links(tmp_path) == ["a.html: b.html#z", "a.html: c.png"]
