"""Steps, filters and addresses of the page."""

from __future__ import annotations

from typing import Any

from support.page import AT_REST, ITEM, PICKS, SLIDER, MakeSettings, OpenPage, asked, expect, running, search, shown, tile


def test_steps_can_be_gone_back_to(address: str, open_page: OpenPage) -> None:
    page = open_page(address)
    tile(page, ITEM).locator(".pick").click()
    expect(page.locator(AT_REST)).to_be_attached()
    search(page, "in red")
    first = shown(page)
    page.locator(PICKS).nth(2).click()
    expect(page.locator("#text")).to_have_value("")
    search(page, "with long sleeves")
    second = shown(page)
    expect(page.locator(".crumb")).to_have_count(2)
    expect(page.locator(".crumb[aria-current=step]")).to_contain_text("with long sleeves")
    page.go_back()  # to the picked item without a text
    expect(page.locator("#text")).to_have_value("")
    page.go_back()
    expect(page.locator("#text")).to_have_value("in red")
    expect(page.locator(AT_REST)).to_be_attached()
    assert shown(page) == first
    page.go_forward()
    page.go_forward()
    expect(page.locator("#text")).to_have_value("with long sleeves")
    expect(page.locator(AT_REST)).to_be_attached()
    assert shown(page) == second
    page.locator(".crumb").first.click()
    expect(page.locator("#text")).to_have_value("in red")
    expect(page.locator(".crumb")).to_have_count(2)
    expect(page.locator(AT_REST)).to_be_attached()
    assert shown(page) == first


def test_examples_that_are_not_wanted_are_taken_back_one_by_one(address: str, open_page: OpenPage) -> None:
    page = open_page(f"{address}?ref={ITEM}&text=in+red")
    gone = shown(page)[:2]
    for id in gone:
        tile(page, id).locator(".pick").focus()
        with page.expect_request("**/v1/search") as sent:
            page.keyboard.press("x")
    assert asked(sent.value)["unlike"] == gone
    expect(tile(page, gone[1])).to_have_count(0)
    page.get_by_role("button", name=f"Undo: not like {gone[0]}").click()
    expect(tile(page, gone[0])).to_have_count(1)
    expect(tile(page, gone[1])).to_have_count(0)


def test_an_address_is_a_whole_search(address: str, open_page: OpenPage) -> None:
    requests: list[dict[str, Any]] = []
    asks = "?ref=sub%2F01.png&text=in+red&w.colour=2&unlike=02.png&is.colour=red&is.colour=blue&on.sale=no&page=2"
    page = open_page(
        address + asks,
        prepare=lambda page: page.on("request", lambda sent: requests.append(asked(sent)) if sent.url.endswith("/v1/search") else None),
    )
    (query,) = requests
    assert query["reference_id"] == ITEM
    assert query["weights"] == {"colour": 2}
    assert query["unlike"] == ["02.png"]
    assert query["filter"] == {"and": [{"colour": {"in": ["red", "blue"]}}, {"sale": False}]}
    assert query["k"] == 48
    expect(page.locator("#text")).to_have_value("in red")
    expect(page.locator(SLIDER).first).to_have_value("2")
    expect(page.locator(".chip")).to_have_count(3)
    assert sorted(page.url.split("?")[1].split("&")) == sorted(asks[1:].split("&"))
    before = shown(page)
    page.reload()
    expect(page.locator(PICKS)).to_have_count(len(before))
    assert shown(page) == before


def test_the_page_works_under_a_path(make_settings: MakeSettings, open_page: OpenPage) -> None:
    with running(make_settings(), prefix="/shop/search") as address:
        page = open_page(address)
        tile(page, ITEM).locator(".pick").click()
        search(page, "in red")
        assert len(shown(page)) == 23
        assert page.url.startswith(f"{address}?")
        assert page.locator("#grid img").first.evaluate("image => image.decode().then(() => image.naturalWidth)") > 0
