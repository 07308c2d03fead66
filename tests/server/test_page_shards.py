"""The page of a server over shards or a database: it offers what the index offers, and says what an answer lacks."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.page import AT_REST, ITEM, PICKS, OpenPage, Page, Route, asked, expect, running, search, shown, tile

from dqe_engine.index import GalleryIndex
from dqe_engine.index.shard_files import cut_index
from dqe_engine.server.settings import ServerSettings

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sharded(bundle_path: Path, shop: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of the page of a server over the shop's items in two shards."""
    place = tmp_path_factory.mktemp("page") / "shards"
    with GalleryIndex.load(shop / "index") as index:
        cut_index(index, place, 2)
    photos = (("", shop / "photos"),)
    with running(ServerSettings(bundle=bundle_path, index=place, photos=photos, provider="cpu", threads=1)) as address:
        yield address


def offering(*offers: str) -> Any:
    """Prepares a page whose server says that its index offers these alone."""

    def answer(route: Route) -> None:
        vocabulary = route.fetch().json()
        route.fulfill(json={**vocabulary, "offers": list(offers)})

    return lambda page: page.route("**/v1/vocabulary", answer)


def test_items_of_shards_are_browsed_searched_and_changed(open_page: OpenPage, sharded: str, address: str) -> None:
    requests: list[str] = []
    page = open_page(sharded, prepare=lambda page: page.on("request", lambda request: requests.append(request.url)))
    expect(page.locator(PICKS)).to_have_count(24)
    assert not any("/v1/facets" in url for url in requests), "what is not offered is not asked for"
    expect(page.locator("#filters")).to_be_hidden()
    expect(page.locator("#open-manage")).to_be_hidden()
    expect(page.locator("#weights")).to_be_visible()
    single = open_page(address)
    expect(single.locator("#filters")).to_be_visible()
    for one in (page, single):
        tile(one, ITEM).locator(".pick").click()
        expect(one.locator(AT_REST)).to_be_attached()
        search(one, "in red")
        expect(one.locator("#results-title")).to_have_text("Results")
    assert shown(page) == shown(single)
    expect(tile(page, ITEM)).to_have_count(0)
    page.goto(f"{sharded}?is.colour=red")  # a filter that an address brings is applied, and can be taken away
    expect(page.locator("#grid > .tile")).to_have_count(8)
    page.get_by_role("button", name="Remove colour: red").click()
    expect(page.locator("#grid > .tile")).to_have_count(24)


def test_an_answer_that_lacks_items_says_so(open_page: OpenPage, sharded: str) -> None:
    def lacking(page: Page, **lacks: Any) -> None:
        page.unroute("**/v1/search")
        page.route("**/v1/search", lambda route: route.fulfill(json={**route.fetch().json(), **lacks}))

    page = open_page(sharded)
    for lacks, says in (
        ({"exact": False, "lost": ["a-000"]}, "1 part of the index gave no answer (a-000), so items may be missing."),
        ({"exact": False, "lost": ["a-000", "a-001"]}, "2 parts of the index gave no answer (a-000, a-001), so"),
        ({"exact": False, "lost": []}, "It is not proved that nothing in the index fits better."),
    ):
        lacking(page, **lacks)
        search(page, f"in red {len(json.dumps(lacks))}")
        expect(page.locator("#notes")).to_contain_text(says)
    lacking(page)
    search(page, "in red")
    expect(page.locator("#notes")).not_to_contain_text("index")


def test_a_database_is_searched_without_a_list(open_page: OpenPage, sharded: str) -> None:
    """No list, no filters, no items that a text changes; and zones are not asked for together with a filter."""
    requests: list[str] = []
    searches: list[dict[str, Any]] = []

    def prepare(page: Page) -> None:
        offering()(page)
        page.on("request", lambda request: requests.append(request.url))
        page.on("request", lambda request: searches.append(asked(request)) if request.url.endswith("/v1/search") else None)

    page = open_page(sharded, prepare=prepare)
    expect(page.locator("#results-title")).to_have_text("Nothing asked yet")
    expect(page.locator("#summary")).to_have_text("Describe what you look for, or add an image.")
    expect(page.locator("#grid > .tile")).to_have_count(0)
    search(page, "in red")
    expect(page.locator("#grid > .tile")).to_have_count(24)
    pick = tile(page, ITEM).locator(".pick")
    assert (pick.get_attribute("aria-label") or "").startswith(f"Find items like this one: {ITEM}")
    pick.click()
    expect(page.locator("#lead")).to_have_text("Like this")
    expect(page.locator("#text")).to_be_disabled()
    expect(page.locator("#notes")).to_have_text(re.compile("^Items of this index cannot be changed by a text here"))
    expect(tile(page, ITEM)).to_have_count(0)
    page.get_by_role("button", name="Remove the reference image").click()
    expect(page.locator("#text")).to_be_enabled()
    expect(page.locator("#results-title")).to_have_text("Nothing asked yet")
    page.goto(f"{sharded}?text=in+red&is.colour=red")
    expect(page.locator("#grid > .tile")).to_have_count(8)
    assert [(one.get("reference_id"), one["zones"]) for one in searches] == [(None, True), (ITEM, True), (None, False)]
    assert not any("/v1/facets" in url or url.partition("?")[0].endswith("/v1/items") for url in requests)
