"""A search on the page: by an item, by weights, and what its details and notes say."""

from __future__ import annotations

import pytest
from support.page import AT_REST, ITEM, LONG, PICKS, SLIDER, OpenPage, Route, asked, expect, paged, search, shown, tile


def test_an_item_that_is_clicked_becomes_the_reference_and_a_text_changes_it(address: str, open_page: OpenPage) -> None:
    page = open_page(address)
    assert len(shown(page)) == 24
    with page.expect_request("**/v1/search") as alone:
        tile(page, ITEM).locator(".pick").click()
    assert asked(alone.value)["reference_id"] == ITEM
    expect(page.locator("#notes")).to_contain_text("not what the model was trained for")
    expect(page.locator("#text")).to_be_focused()
    with page.expect_response("**/v1/search") as both:
        page.keyboard.type("the same but red")
        page.keyboard.press("Enter")
    hits = both.value.json()["hits"]
    expect(page.locator("#live")).to_contain_text(f"23 results, best {hits[0]['score']:.2f}")
    assert shown(page) == [hit["id"] for hit in hits]
    assert ITEM not in shown(page)
    page.wait_for_url(lambda url: "text=the+same+but+red" in url)
    page.wait_for_url(lambda url: "ref=sub%2F01.png" in url)


def test_details_say_what_the_score_is_made_of(address: str, open_page: OpenPage) -> None:
    page = open_page(f"{address}?ref={ITEM}&text=the+same+but+red")
    first = page.locator("#grid > .tile").first
    first.hover()
    first.locator(".info").click()
    dialog = page.locator("#details")
    expect(dialog.locator(".alike .pick")).to_have_count(6)
    parts = [float(text.replace("−", "-")) for text in dialog.locator("td.number").all_inner_texts()]
    assert len(parts) == 3
    assert sum(parts) == pytest.approx(float(dialog.locator(".why h3 .number").inner_text().replace("−", "-")), abs=0.02)
    expect(dialog.locator(".metadata")).to_contain_text("price")
    page.wait_for_url(lambda url: "item=" in url)
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    expect(first.locator(".info")).to_be_focused()
    page.wait_for_url(lambda url: "item=" not in url)


def test_sliders_rank_anew_and_need_a_text(address: str, open_page: OpenPage) -> None:
    page = open_page(f"{address}?ref={ITEM}")
    slider = page.locator(SLIDER).first
    expect(slider).to_be_disabled()
    expect(page.locator("#weights-why")).to_contain_text("Off")
    search(page, "the same but red")
    expect(slider).to_be_enabled()
    expect(page.locator(".slider .said").first).to_contain_text("predicted")
    entries = page.evaluate("history.length")
    for key, weight in (("End", 2), ("ArrowLeft", 1.9), ("Home", 0)):
        with page.expect_response("**/v1/search") as answer:
            slider.press(key)
        assert asked(answer.value.request)["weights"] == {"colour": pytest.approx(weight)}
        order = [hit["id"] for hit in answer.value.json()["hits"]]
        expect(page.locator("#grid > .tile").first).to_have_attribute("data-id", order[0])
        expect(page.locator(AT_REST)).to_be_attached()
        assert shown(page) == order
    assert page.evaluate("history.length") == entries + 1
    page.wait_for_url(lambda url: "w.colour=0" in url)
    with page.expect_request("**/v1/search") as reset:
        page.locator("#reset-weights").click()
    assert "weights" not in asked(reset.value)


def test_an_attribute_that_the_text_does_not_name_has_no_slider(address: str, open_page: OpenPage) -> None:
    page = open_page(f"{address}?ref={ITEM}&w.colour=7")
    page.route("**/v1/search", lambda route: _with_weights(route, {"colour": 1.1, "shape": 0.02}))
    search(page, "the same but red")
    named, unnamed = page.locator(SLIDER).first, page.locator(SLIDER).nth(1)
    expect(named).to_be_enabled()
    expect(unnamed).to_be_disabled()
    expect(page.locator(".slider .said").nth(1)).to_have_text("not in your text")
    page.route("**/v1/search", lambda route: _with_weights(route, {"colour": 0.01, "shape": 0.9}))
    search(page, "the same but long")
    expect(named).to_be_disabled()
    expect(unnamed).to_be_enabled()


def _with_weights(route: Route, predicted: dict[str, float]) -> None:
    answer = route.fetch()
    route.fulfill(response=answer, json={**answer.json(), "predicted_weights": predicted})


def test_an_older_answer_never_takes_the_place_of_a_newer_one(address: str, open_page: OpenPage) -> None:
    page = open_page(f"{address}?ref={ITEM}&text=the+same+but+red")
    held: list[Route] = []

    def answer(route: Route) -> None:
        if asked(route.request)["weights"] == {"colour": 2}:
            held.append(route)
        else:
            route.continue_()

    page.route("**/v1/search", answer)
    slider = page.locator(SLIDER).first
    with page.expect_request("**/v1/search"):
        slider.press("End")
    with page.expect_response("**/v1/search") as newer:
        slider.press("Home")
    order = [hit["id"] for hit in newer.value.json()["hits"]]
    expect(page.locator(AT_REST)).to_be_attached()
    assert shown(page) == order
    stale = {**newer.value.json(), "hits": newer.value.json()["hits"][:1]}
    for route in held:
        route.fulfill(json=stale)
    page.evaluate("fetch('healthz').then(answer => answer.text())")  # whatever was under way before it has arrived
    assert len(held) == 1
    assert shown(page) == order


def test_what_became_of_a_text_is_told_under_it(address: str, open_page: OpenPage) -> None:
    page = open_page(f"{address}?ref={ITEM}")
    answer = {**paged({"offset": 0, "k": 3}), "mode": "composed", "truncated": True, "unknown_words": ["zorkish", "x" * 400]}
    page.route("**/v1/search", lambda route: route.fulfill(json=answer))
    search(page, LONG)
    expect(page.locator("#notes")).to_contain_text("does not know “zorkish”")
    expect(page.locator("#notes")).to_contain_text("longer than the model reads")


def test_zones_are_told_apart(address: str, open_page: OpenPage) -> None:
    page = open_page(f"{address}?ref={ITEM}&text=in+red")
    zones = page.locator("#grid .zone, #grid .zone-head.mid")
    expect(zones).to_have_count(1)
    expect(zones).to_contain_text("Similar but different")


def test_more_results_come_on_scrolling(open_page: OpenPage, address: str) -> None:
    page = open_page(address, viewport={"width": 390, "height": 500})
    page.route("**/v1/search", lambda route: route.fulfill(json=paged(asked(route.request))))
    search(page, "in red")
    for together in (48, 60):
        page.evaluate("scrollTo(0, document.documentElement.scrollHeight)")
        expect(page.locator(PICKS)).to_have_count(together)
    expect(page.locator("#more")).to_be_hidden()
    assert shown(page) == [f"item {n}" for n in range(60)]
    page.wait_for_url(lambda url: "page=3" in url)
